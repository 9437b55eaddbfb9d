"""Random access to the samples of JSONL files, through an index of line positions."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find, is_folder

_BLOCK = 1 << 24  # bytes read at a time while searching for line ends
_KEPT_FROM = 1 << 26  # the index of a file of at least this many bytes is cached on disk


class JsonlFile:
    """Random access to the lines of a file; blank lines do not count.

    One pass over the bytes finds the line positions without parsing the lines. For a large file, this index is cached
    for all runs in ``$MEGAVLM_CACHE`` (default ``~/.cache/megavlm``) and memory-mapped, so that a worker's memory does
    not grow with the data set.

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
            self._spans = _line_spans(self._file)
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
            return json.loads(self._file.read(start, end)), partial(self._access.find, self.path, self.source(index))
        except ValueError as error:  # also raised for bytes that are not UTF-8
            raise UserError(
                f"{self.source(index)}: not valid JSON: {shortened(error)}", "write one JSON object per line"
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


def _line_spans(file: File) -> np.ndarray:
    """int64 [samples, 3]: for each line that is not blank, its first byte, the byte after it, its number from 1."""
    size = file.size()
    if size < _KEPT_FROM:
        return _find_lines(file, size)
    folder = Path(os.environ.get("MEGAVLM_CACHE") or Path.home() / ".cache" / "megavlm") / "lines"
    changed = os.stat(file.url).st_mtime_ns if file.local_path else None
    where = os.path.abspath(file.url) if file.local_path else file.url
    kept = folder / f"{hashlib.sha256(repr((where, size, changed)).encode()).hexdigest()[:32]}.npy"
    if not kept.exists():
        spans = _find_lines(file, size)
        try:
            with atomic_open(kept, "wb") as out:
                np.save(out, spans)
        except OSError:  # the disk is full or the home folder is read-only: this run works without the cache
            return spans
    return np.load(kept, mmap_mode="r")


def _find_lines(file: File, size: int) -> np.ndarray:
    ends, last = [], b""
    for start in range(0, size, _BLOCK):
        last = file.read(start, min(start + _BLOCK, size))
        ends.append(np.flatnonzero(np.frombuffer(last, dtype=np.uint8) == ord("\n")) + start + 1)
    found = np.concatenate([np.empty(0, dtype=np.int64), *ends])
    if last and not last.endswith(b"\n"):  # the last line may end without a line feed
        found = np.append(found, size)
    starts = np.concatenate([[0], found])[:-1].astype(np.int64)
    is_blank = np.zeros(len(found), dtype=bool)
    for line in np.flatnonzero(found - starts <= 16):  # only short lines can be blank; longer ones need not be read
        is_blank[line] = not file.read(int(starts[line]), int(found[line])).strip()
    return np.stack([starts, found, np.arange(1, len(found) + 1)], axis=1)[~is_blank]
