"""Random access to the samples of JSONL files and JSON arrays, through an index of positions."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find, is_folder
from megavlm.sources.inline import may_be_inside, with_names
from megavlm.sources.json_array import array_spans
from megavlm.sources.line_index import line_spans


class JsonlFile:
    """Random access to the lines of a file, where blank lines do not count, or to the elements of a JSON array.

    A file that does not end in .jsonl may be an array of objects, or an object with such an array in its field "data".

    One pass over the bytes finds the line positions without parsing the lines. For a large file, this index is cached
    and memory-mapped (``line_index``), so that a worker's memory does not grow with the data set.

    Args:
        path: a path, or a URL that fsspec supports.
        access: which media the lines may name.

    Raises:
        UserError: the file does not exist, is a folder, or has no lines.
    """

    form: str | None = None
    read_with: tuple = ()

    def __init__(self, path: str | Path, access: MediaAccess = ANY_LOCAL_FILE):
        self.path, self._access = str(path), access
        self._file = File(self.path)
        try:
            spans = None if self.path.endswith(".jsonl") else array_spans(self._file)
            self._spans = line_spans(self._file) if spans is None else spans
        except UserError:
            raise
        except Exception as error:  # each protocol of fsspec raises its own exceptions
            found = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {shortened(error)}"
            if _is_folder(self.path):
                found = "is a folder, not a JSONL file"
            raise UserError(f"data file {self.path} {found}", "give the path or URL of a JSONL file") from None
        if len(self) == 0:
            raise UserError(f"data file {self.path} is empty", "give a file with one JSON object per line")

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def index_files(self) -> list[str]:
        """The files that change when the samples change."""
        return [self.path]

    def source(self, index: int) -> str:
        """ "file:line" of sample `index`, or "file:number" of an element of an array, from 1."""
        return f"{self.path}:{int(self._spans[index, 2])}"

    def index_of(self, number: int) -> int:
        """The index of the sample whose ``source`` ends with this number. Raises UserError if there is none."""
        found = int(np.searchsorted(self._spans[:, 2], number))
        if found == len(self) or self._spans[found, 2] != number:
            raise UserError(f"{self.path} has no sample in line {number}")
        return found

    def raw(self, index: int) -> Any:
        """The parsed line of sample `index` as it is in the file."""
        return parse_json(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
        start, end = (int(bound) for bound in self._spans[index, :2])
        return self._file.read(start, end).rstrip()

    def read(self, index: int) -> tuple[Any, Find]:
        """The parsed line of sample `index` (from 0), and the function that locates its media.

        Pictures in base64 are replaced by names (see ``inline``).

        Raises UserError if the line cannot be read or is not valid JSON.
        """
        try:
            line = self._bytes(index)
            record: Any = parse_json(line)
            find: Find = partial(self._access.find, self.path, self.source(index))
            return with_names(self, index, record, find) if may_be_inside(line) else (record, find)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            cause = shortened(error)
            if isinstance(error, json.JSONDecodeError):  # whose own words call every line "line 1"
                cause = f"{error.msg} at column {error.colno}"
            raise UserError(
                f"{self.source(index)}: not valid JSON: {cause}", "write one JSON object per line"
            ) from None
        except Exception as error:
            raise UserError(f"{self.source(index)}: cannot be read: {shortened(error)}") from None


def _is_folder(path: str) -> bool:
    try:
        return is_folder(path)
    except Exception:
        return False
