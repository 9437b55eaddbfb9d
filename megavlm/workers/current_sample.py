"""Which sample a process is reading, noted in memory that outlives it: if it dies, the note names the sample.

Native decoders may crash, and the kernel kills processes when the machine runs out of memory. No exception handler
runs then.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

RECORD, PIXELS = 1, 2
"""Parts of a sample: its record with the headers of its media, and the pixels. They are read at different times."""

_NOTE = struct.Struct("<4q")  # process id, part (0: no sample is being read), source, index


class Reading(NamedTuple):
    """What was being read: ``RECORD`` or ``PIXELS``, the number of the source, the number of the sample in it."""

    part: int
    source: int
    sample: int


class Notes:
    """One note for each worker process; shared by processes that are forked after it was made.

    Args:
        count: number of notes.
        path: a file that keeps the notes even if the process that made them dies as well; None: memory only. If the
            file cannot be created, for example because the disk is full, memory is used.
    """

    def __init__(self, count: int, path: Path | None = None):
        self._size, self._path = count * _NOTE.size, path
        self._memory = mmap.mmap(-1, self._size)
        if path is not None:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Written, not only sized: a page without a block on a full disk would itself kill the process.
                path.write_bytes(bytes(self._size))
                with path.open("r+b") as file:
                    self._memory = mmap.mmap(file.fileno(), self._size)

    @staticmethod
    def left_in(path: Path) -> Reading | None:
        """The first sample that a process was reading when it died, from the file of an earlier start."""
        try:
            notes = path.read_bytes()
        except OSError:
            return None
        whole = notes[: len(notes) // _NOTE.size * _NOTE.size]
        return next((Reading(*note[1:]) for note in _NOTE.iter_unpack(whole) if note[1]), None)

    def of(self, process: int) -> Reading | None:
        """What the worker with this process id was reading; None if it was not reading a sample."""
        for pid, *reading in _NOTE.iter_unpack(self._memory[:]):
            if pid == process:
                return Reading(*reading) if reading[0] else None
        return None

    def use(self, number: int) -> None:
        """From now on, ``reading`` in this process writes the note with this number."""
        global _mine
        _mine = (self._memory, number * _NOTE.size)
        _write(0, 0, 0)

    def close(self) -> None:
        """Remove the file; the notes of a process that ends in order are of no use."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


_mine: tuple[mmap.mmap, int] | None = None  # the memory and place of this process's note


@contextmanager
def reading(part: int, source: int, index: int) -> Iterator[None]:
    """Notes that this process reads this part of a sample while the block runs. Blocks must not be nested."""
    _write(part, source, index)
    try:
        yield
    finally:
        _write(0, 0, 0)


def _write(part: int, source: int, index: int) -> None:
    if _mine is not None:
        _NOTE.pack_into(*_mine, os.getpid(), part, source, index)
