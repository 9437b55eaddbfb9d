"""Ends a run that makes no progress, and shows the stack traces of each rank.

If a rank hangs (for example because a file system does not respond or a network link is lost), all other ranks wait in
their next collective, and soon no rank makes progress. Then all ranks show their stack traces. A rank that waits for
another one, which indexes a large file, say, does not hang: the ranks share the time of the last progress of any of
them through a file in the output folder.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megavlm.base import heartbeat
from megavlm.config.requirements import required
from megavlm.config.settings import Settings

FOLDER = "stacks"  # within the output folder
_ALIVE = ".alive"  # within the output folder: its time of modification is that of the last progress of any rank
_MOST_BETWEEN_LOOKS = 30.0  # maximum seconds between two looks at that file
_MOST_GRACE = 10.0  # maximum seconds between showing the stacks and ending, so that all ranks can show theirs
_WITHOUT_LIMIT = 30.0  # timeout of a collective in minutes if train.hang_minutes is null
_DAY = 24 * 60.0


def collective_minutes(hang_minutes: float | None, *, watched: bool = True) -> float:
    """The timeout of collectives in minutes. It exceeds the watch's limit, so that the watch ends the run first.

    Args:
        hang_minutes: ``train.hang_minutes``.
        watched: whether a ``HangWatch`` ends the process. Then a rank may wait a day in one collective, as long as
            other ranks make progress.
    """
    if hang_minutes is None:
        return _WITHOUT_LIMIT
    beyond = 1.1 * hang_minutes + 5.0  # ranks reach a collective at different times
    return max(beyond, _DAY) if watched else beyond


class HangWatch:
    """Watches this process from a separate thread. Use it as a context manager.

    If no rank calls ``heartbeat`` for ``minutes``, the Python stacks of all threads are written to standard error and
    to ``OUTPUT/stacks/rankN.txt``, and the process ends with status 1; torchrun, srun and `--nproc` then end the other
    processes. If no Python thread can run, because one of them holds the interpreter lock, faulthandler's own watchdog
    ends the process a little later and writes the stacks only to standard error. While the watch is used,
    ``base.heartbeat.beat`` calls its ``heartbeat``.

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
        self._threads = [threading.Thread(target=self._watch, name="hang watch", daemon=True)]
        self._alive = output / _ALIVE
        self._lock = threading.Lock()  # of faulthandler's timer
        if world_size > 1:  # a thread of its own, because the disk of the output folder may be what hangs
            self._threads.append(threading.Thread(target=self._share, name="shared progress", daemon=True))
        self._last, self._done = time.monotonic(), ""
        self._of_others = self._last  # the last known progress of any rank
        self._stderr = os.dup(2)  # sys.stderr may be replaced later by an object that is not a file

    @classmethod
    def of_run(cls, settings: Settings) -> "HangWatch":
        """The watch of this process, with its rank from the environment; the process group need not exist yet."""
        output = required(settings.output, "output")
        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(settings.train.hang_minutes, output, rank, world_size)

    def heartbeat(self, done: str) -> None:
        """Reports progress, from any thread. ``done`` names what has been completed last, for the message."""
        if self._limit is None or self._ended.is_set():
            return
        self._last, self._done = time.monotonic(), done
        self._set_timer()

    def _set_timer(self) -> None:
        with self._lock:
            if self._limit is not None and not self._ended.is_set():
                left = max(0.0, self._left()) + 2 * self._grace
                faulthandler.dump_traceback_later(left, exit=True, file=self._stderr)

    def _left(self) -> float:
        """Seconds until the limit."""
        assert self._limit is not None, "only a watch with a limit has threads"
        return max(self._last, self._of_others) + self._limit - time.monotonic()

    @property
    def _grace(self) -> float:
        return _MOST_GRACE if self._limit is None else min(_MOST_GRACE, self._limit)

    def __enter__(self) -> "HangWatch":
        self.heartbeat("the start of the process")
        if self._limit is not None:
            heartbeat.listen(self.heartbeat)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._ended.set()
            if self._limit is not None:
                heartbeat.listen(None)
                faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)

    def _share(self) -> None:
        """Tells the other ranks of this rank's progress, and learns of theirs."""
        assert self._limit is not None, "only a watch with a limit has threads"
        between = min(_MOST_BETWEEN_LOOKS, self._limit / 10)
        while not self._ended.wait(between):
            with contextlib.suppress(OSError):
                now, clock = time.monotonic(), time.time()
                try:
                    known = now - max(0.0, clock - self._alive.stat().st_mtime)
                except FileNotFoundError:
                    known = float("-inf")
                if known > self._of_others:
                    self._of_others = known
                    self._set_timer()
                # A folder without a run's configuration is not ours yet, and must stay empty.
                if self._last > known + between / 2 and (self._alive.parent / "config.yaml").exists():
                    if not self._alive.exists():
                        self._alive.touch()
                    when = clock - (now - self._last)
                    os.utime(self._alive, (when, when))

    def _watch(self) -> None:
        assert self._limit is not None, "only a watch with a limit has threads"
        while (left := self._left()) > 0:
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
