"""The positions of the lines of a file, found by several threads; for large files kept on disk.

A large file is cut into pieces. The positions of each piece are kept beside the index until it is complete, so that an
interruption costs only the pieces in progress. One process of a machine works, the others wait.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from megavlm.base import heartbeat
from megavlm.base.atomic_files import atomic_open
from megavlm.media.files import File

_BLOCK = 1 << 24  # bytes read at a time while searching for line ends
_PIECE = 1 << 28  # bytes whose line ends are kept together until the index is complete
_KEPT_FROM = 1 << 26  # the index of a file of at least this many bytes is cached on disk
_MOST_THREADS = 8
_LONGEST_BLANK = 16  # only lines of at most this many bytes can be blank; longer ones need not be looked at
_WAIT = 0.5  # seconds between two looks at the process that works


def line_spans(file: File) -> np.ndarray:
    """int64 [samples, 3]: for each line that is not blank, its first byte, the byte after it, its number from 1.

    The index of a large file is cached for all runs in ``$MEGAVLM_CACHE`` (default ``~/.cache/megavlm``) and
    memory-mapped. It belongs to the file's path, size and time of modification (for a URL: to its address and size).
    Raises OSError if the file cannot be read.
    """
    size = file.size()
    if size < _KEPT_FROM:
        return _joined(file, size, _pieces(file, size, None))
    return kept_index(file, "lines", lambda parts: _joined(file, size, _pieces(file, size, parts)))


def kept_index(file: File, kind: str, make: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The index of a file from the cache, memory-mapped; if it is not there, what ``make`` returns is kept there.

    Args:
        file: the file to which the index belongs (see ``cache_path``).
        kind: the name of the folder of these indexes in the cache.
        make: gets a folder for unfinished work, which is removed afterwards.
    """
    kept = cache_path(file, kind, ".npy")
    with turn(kept) as parts:
        if not kept.exists():  # nor has another process made it meanwhile
            spans = make(parts)
            try:
                with atomic_open(kept, "wb") as out:
                    np.save(out, spans)
            except OSError:  # the disk is full or the home folder is read-only: this run works without the cache
                return spans
    return np.load(kept, mmap_mode="r")


def cache_path(file: File, kind: str, suffix: str) -> Path:
    """The path in the cache of what was made from a file with this path, size and time of modification.

    Protocols do not all tell the time of modification of a URL: there, the address and the size must do.
    """
    folder = Path(os.environ.get("MEGAVLM_CACHE") or Path.home() / ".cache" / "megavlm") / kind
    changed = os.stat(file.url).st_mtime_ns if file.local_path else None
    where = os.path.abspath(file.url) if file.local_path else file.url
    return folder / f"{hashlib.sha256(repr((where, file.size(), changed)).encode()).hexdigest()[:32]}{suffix}"


@contextmanager
def turn(kept: Path) -> Iterator[Path]:
    """Waits until no other process of this machine makes ``kept``; yields a folder for unfinished work.

    The folder is removed once ``kept`` exists. The work of the other process is a sign of life.
    """
    parts = kept.with_suffix(".parts")
    if kept.exists():
        yield parts
        return
    lock = None
    with suppress(OSError):  # without a lock, the same work may be done twice
        parts.mkdir(parents=True, exist_ok=True)
        lock = kept.with_suffix(".lock").open("w")
    done = -1
    while lock is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if (now := len(list(parts.glob("*")))) != done:
                heartbeat.beat(f"{now} pieces of a data file were indexed by another process")
            done = now
            time.sleep(_WAIT)
        except OSError:  # the file system has no locks
            break
    try:
        yield parts
        if kept.exists():
            shutil.rmtree(parts, ignore_errors=True)
    finally:
        if lock is not None:
            lock.close()


def _pieces(file: File, size: int, parts: Path | None) -> list[np.ndarray]:
    """The results of ``_ends_in`` for all pieces; those that an earlier process has kept in ``parts`` are read."""

    def piece(start: int) -> np.ndarray:
        kept = None if parts is None else parts / f"{start}.npy"
        if kept is not None:
            with suppress(OSError, ValueError):
                return np.load(kept)
        found = _ends_in(file, start, min(start + _PIECE, size))
        if kept is not None:
            with suppress(OSError), atomic_open(kept, "wb") as out:
                np.save(out, found)
        return found

    starts = range(0, size, _PIECE)
    if len(starts) < 2:
        return [piece(start) for start in starts]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(piece, starts))


def _ends_in(file: File, start: int, stop: int) -> np.ndarray:
    """int64 [2, n]: for each line feed from byte `start` to before `stop`, the byte after it, and whether the line is
    blank: 0 or 1, and -1 for the first one, whose line may begin earlier.
    """
    ends, blanks = [], []
    for first in range(start, stop, _BLOCK):
        block = file.read(first, min(first + _BLOCK, stop))
        here = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1
        blank = np.zeros(len(here), dtype=np.int64)
        for line in np.flatnonzero(np.diff(here) <= _LONGEST_BLANK) + 1:
            blank[line] = not block[here[line - 1] : here[line]].strip()
        blank[:1] = -1  # of each block
        ends.append(here + first)
        blanks.append(blank)
        heartbeat.beat(f"indexing {file} from byte {first}")
    if not ends:
        return np.empty((2, 0), dtype=np.int64)
    return np.stack([np.concatenate(ends), np.concatenate(blanks)])


def _joined(file: File, size: int, pieces: list[np.ndarray]) -> np.ndarray:
    ends, blank = np.concatenate([np.empty((2, 0), dtype=np.int64), *pieces], axis=1)
    if size and (not len(ends) or ends[-1] != size):  # the last line may end without a line feed
        ends, blank = np.append(ends, size), np.append(blank, -1)
    starts = np.concatenate([[0], ends])[:-1].astype(np.int64)
    blank[(blank == -1) & (ends - starts > _LONGEST_BLANK)] = 0
    for line in np.flatnonzero(blank == -1):
        blank[line] = not file.read(int(starts[line]), int(ends[line])).strip()
    return np.stack([starts, ends, np.arange(1, len(ends) + 1)], axis=1)[blank == 0]
