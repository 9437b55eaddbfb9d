"""JSONL files: an index of their lines, and samples in file order."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.config.errors import UserError
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample

_BLOCK = 1 << 24  # bytes read at a time while looking for line ends


class JsonlFile:
    """Random access to the lines of a file; blank lines do not count.

    One pass over the bytes finds where the lines begin (no line is parsed); 8 bytes a line are kept. Reading shares no
    file position, so forked workers may use one object.

    Args:
        path: the file.

    Raises:
        UserError: no such file, a folder, or no line in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            found = "is not a file" if self.path.exists() else "does not exist"
            raise UserError(f"data file {self.path} {found}", "give the path of a JSONL file")
        self._file = os.open(self.path, os.O_RDONLY)
        ends = self._line_ends()
        starts = np.concatenate([[0], ends[:-1]])
        is_blank = np.zeros(len(ends), dtype=bool)
        for line in np.flatnonzero(ends - starts <= 16):  # a blank line is short; nothing else so short is a sample
            is_blank[line] = not os.pread(self._file, int(ends[line] - starts[line]), int(starts[line])).strip()
        self._starts, self._ends = starts[~is_blank], ends[~is_blank]
        self._lines = np.flatnonzero(~is_blank) + 1 if is_blank.any() else None
        if len(self) == 0:
            raise UserError(f"data file {self.path} is empty", "give a file with one JSON object per line")

    def __len__(self) -> int:
        return len(self._starts)

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def source(self, index: int) -> str:
        """ "file:line" of sample `index`."""
        return f"{self.path}:{index + 1 if self._lines is None else self._lines[index]}"

    def read(self, index: int) -> Any:
        """The parsed line of sample `index` (from 0). Raises UserError if it is not JSON."""
        start, end = int(self._starts[index]), int(self._ends[index])
        try:
            return json.loads(os.pread(self._file, end - start, start))
        except ValueError as error:  # also of bytes that are not UTF-8
            raise UserError(
                f"{self.source(index)}: not valid JSON: {error}", "write one JSON object per line"
            ) from None

    def _line_ends(self) -> np.ndarray:
        """Offset behind each line; the last line need not end in a line feed."""
        size, ends = os.fstat(self._file).st_size, []
        for offset in range(0, size, _BLOCK):
            block = np.frombuffer(os.pread(self._file, _BLOCK, offset), dtype=np.uint8)
            ends.append(np.flatnonzero(block == ord("\n")) + offset + 1)
        found = np.concatenate([np.empty(0, dtype=np.int64), *ends])
        return found if not size or (len(found) and found[-1] == size) else np.append(found, size)


def read_samples(
    path: str | Path, renderer: Renderer, kind: Kind, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[Sample]:
    """The samples of a JSONL file in file order, rendered one by one; of each `num_ranks`, the `rank`-th.

    Raises UserError, naming file and line, at the first sample that cannot be used.
    """
    file = JsonlFile(path)
    for index in range(rank, len(file), num_ranks):
        yield renderer.encode(file.read(index), file.path.parent, file.source(index), kind=kind, index=index)
