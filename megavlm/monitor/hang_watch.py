"""Ends a run that makes no progress, and shows where each rank stands.

A rank that hangs (a file system that does not answer, a lost network link) stops all others in their next collective,
so each rank watches itself alone: whichever hangs, all of them show their stacks.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

FOLDER = "stacks"  # within the output folder
_MOST_GRACE = 10.0  # seconds between showing the stacks and ending: every rank should have shown its own
_WITHOUT_WATCH = 30.0  # minutes that a collective waits where there is no watch


def collective_minutes(hang_minutes: float | None) -> float:
    """Longest wait of a collective: beyond the watch's limit, so that the watch, which shows the stacks, comes first.

    A collective began after the last sign of progress, so the same limit would do; the margin is for ranks that came
    to it at different times.
    """
    return _WITHOUT_WATCH if hang_minutes is None else 1.1 * hang_minutes + 5.0


class HangWatch:
    """Watches this process from a thread of its own; use it as a context manager.

    If ``minutes`` pass without a ``heartbeat``, the Python stacks of all threads go to standard error and to
    ``OUTPUT/stacks/rankN.txt``, and the process ends with status 1; torchrun, srun and `--nproc` then end the others.
    A process so stuck that no Python thread runs (one of them keeps the interpreter's lock) is ended by faulthandler's
    own watchdog a little later, with its stacks on standard error alone.

    Args:
        minutes: None: every call does nothing.
        output: the run's folder.
        rank, world_size: for the messages.
    """

    def __init__(self, minutes: float | None, output: Path, rank: int, world_size: int):
        self._limit = None if minutes is None else 60 * minutes
        self._file = output / FOLDER / f"rank{rank}.txt"
        self._who = f"rank {rank} of {world_size} on {socket.gethostname()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._stderr = os.dup(2)  # what sys.stderr is now need not be a file later

    @classmethod
    def of_run(cls, settings) -> "HangWatch":
        """For this process's place in the group, which need not exist yet."""
        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(settings.train.hang_minutes, settings.output, rank, world_size)

    def heartbeat(self, done: str) -> None:
        """A sign of progress. ``done``: what has just ended, for the message."""
        if self._limit is None:
            return
        self._last, self._done = time.monotonic(), done
        faulthandler.dump_traceback_later(self._limit + 2 * self._grace, exit=True, file=self._stderr)

    @property
    def _grace(self) -> float:
        return min(_MOST_GRACE, self._limit)

    def __enter__(self) -> "HangWatch":
        self.heartbeat("the start of the process")
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._ended.set()
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)

    def _watch(self) -> None:
        while (left := self._last + self._limit - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        heading = f"{self._who}: no progress for {self._limit / 60:g} minutes (train.hang_minutes) since {self._done}"
        with contextlib.suppress(OSError):
            self._show(heading, self._stderr)
        with contextlib.suppress(OSError):  # it may be the very disk that hangs: after the terminal
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                self._show(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {heading}", file.fileno())
        time.sleep(self._grace)
        os._exit(1)

    def _show(self, heading: str, file: int) -> None:
        sys.stderr.flush()
        os.write(file, f"\n{heading}; its stacks:\n".encode())
        faulthandler.dump_traceback(file=file, all_threads=True)
