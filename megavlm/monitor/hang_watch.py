"""Ends a run that makes no progress, and shows the stack traces of each rank.

If a rank hangs (for example because a file system does not respond or a network link is lost), all other ranks wait in
their next collective. So each rank needs to watch only itself, and all ranks show their stack traces.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megavlm.config.requirements import required
from megavlm.config.settings import Settings

FOLDER = "stacks"  # within the output folder
_MOST_GRACE = 10.0  # maximum seconds between showing the stacks and ending, so that all ranks can show theirs
_WITHOUT_WATCH = 30.0  # timeout of a collective in minutes if there is no watch


def collective_minutes(hang_minutes: float | None) -> float:
    """The timeout of collectives in minutes. It exceeds the watch's limit, so that the watch ends the run first.

    A collective begins after the last sign of progress, so the same limit would suffice. The margin accounts for ranks
    that reach the collective at different times.
    """
    return _WITHOUT_WATCH if hang_minutes is None else 1.1 * hang_minutes + 5.0


class HangWatch:
    """Watches this process from a separate thread. Use it as a context manager.

    If there is no ``heartbeat`` for ``minutes``, the Python stacks of all threads are written to standard error and to
    ``OUTPUT/stacks/rankN.txt``, and the process ends with status 1; torchrun, srun and `--nproc` then end the other
    processes. If no Python thread can run, because one of them holds the interpreter lock, faulthandler's own watchdog
    ends the process a little later and writes the stacks only to standard error.

    Args:
        minutes: the limit; None: all calls do nothing.
        output: the run's folder.
        rank: this rank, for messages.
        world_size: number of ranks, for messages.
    """

    def __init__(self, minutes: float | None, output: Path, rank: int, world_size: int):
        self._limit = None if minutes is None else 60 * minutes
        self._file = output / FOLDER / f"rank{rank}.txt"
        self._who = f"rank {rank} of {world_size} on {socket.gethostname()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._last, self._done = time.monotonic(), ""
        self._stderr = os.dup(2)  # sys.stderr may be replaced later by an object that is not a file

    @classmethod
    def of_run(cls, settings: Settings) -> "HangWatch":
        """The watch of this process, with its rank from the environment; the process group need not exist yet."""
        output = required(settings.output, "output")
        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(settings.train.hang_minutes, output, rank, world_size)

    def heartbeat(self, done: str) -> None:
        """Reports progress. ``done`` names what has just been completed, for the message."""
        if self._limit is None:
            return
        self._last, self._done = time.monotonic(), done
        faulthandler.dump_traceback_later(self._limit + 2 * self._grace, exit=True, file=self._stderr)

    @property
    def _grace(self) -> float:
        return _MOST_GRACE if self._limit is None else min(_MOST_GRACE, self._limit)

    def __enter__(self) -> "HangWatch":
        self.heartbeat("the start of the process")
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)

    def _watch(self) -> None:
        assert self._limit is not None, "only a watch with a limit starts its thread"
        while (left := self._last + self._limit - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        heading = f"{self._who}: no progress for {self._limit / 60:g} minutes (train.hang_minutes) since {self._done}"
        with contextlib.suppress(OSError):
            self._show(heading, self._stderr)
        with contextlib.suppress(OSError):  # after the terminal, because this disk may be what hangs
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                self._show(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {heading}", file.fileno())
        time.sleep(self._grace)
        os._exit(1)

    def _show(self, heading: str, file: int) -> None:
        sys.stderr.flush()
        os.write(file, f"\n{heading}; stacks of its threads:\n".encode())
        faulthandler.dump_traceback(file=file, all_threads=True)
