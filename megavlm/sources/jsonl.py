"""Random access to the samples of JSONL files, through an index of line positions."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find, is_folder
from megavlm.sources.line_index import line_spans


class JsonlFile:
    """Random access to the lines of a file; blank lines do not count.

    One pass over the bytes finds the line positions without parsing the lines. For a large file, this index is cached
    and memory-mapped (``line_index``), so that a worker's memory does not grow with the data set.

    Args:
        path: a path, or a URL that fsspec supports.
        access: which media the lines may name.

    Raises:
        UserError: the file does not exist, is a folder, or has no lines.
    """

    def __init__(self, path: str | Path, access: MediaAccess = ANY_LOCAL_FILE):
        self.path, self._access = str(path), access
        self._file = File(self.path)
        try:
            self._spans = line_spans(self._file)
        except Exception as error:  # each protocol of fsspec raises its own exceptions
            found = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {shortened(error)}"
            if _is_folder(self.path):
                found = "is a folder, not a JSONL file"
            raise UserError(f"data file {self.path} {found}", "give the path or URL of a JSONL file") from None
        if len(self) == 0:
            raise UserError(f"data file {self.path} is empty", "give a file with one JSON object per line")

    def __len__(self) -> int:
        return len(self._spans)

    def source(self, index: int) -> str:
        """ "file:line" of sample `index`."""
        return f"{self.path}:{int(self._spans[index, 2])}"

    def read(self, index: int) -> tuple[Any, Find]:
        """The parsed line of sample `index` (from 0), and the function that locates its media.

        Raises UserError if the line cannot be read or is not valid JSON.
        """
        start, end = (int(bound) for bound in self._spans[index, :2])
        try:
            record = json.loads(self._file.read(start, end).rstrip())
            return record, partial(self._access.find, self.path, self.source(index))
        except ValueError as error:  # also raised for bytes that are not UTF-8
            cause = shortened(error)
            if isinstance(error, json.JSONDecodeError):  # whose own words call every line "line 1"
                cause = f"{error.msg} at column {error.colno}"
            raise UserError(
                f"{self.source(index)}: not valid JSON: {cause}", "write one JSON object per line"
            ) from None
        except RecursionError:
            raise UserError(f"{self.source(index)}: its lists or objects are nested too deeply") from None
        except Exception as error:
            raise UserError(f"{self.source(index)}: cannot be read: {shortened(error)}") from None


def _is_folder(path: str) -> bool:
    try:
        return is_folder(path)
    except Exception:
        return False
