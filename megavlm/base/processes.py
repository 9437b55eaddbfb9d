"""What a worker process does when the one that it works for ends, or when a stopped job sends signals to both."""

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a stopped job sends them to all its processes


def end_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent dies, even if the parent is killed by SIGKILL.

    Args:
        parent: process id of the parent, if known. If the parent has already ended, this process ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Processes that this thread starts in the block hold stop signals back until they call `ignore_stop_signals`.

    Without it, one that comes while the interpreter starts would end a process that was going to ignore it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Ignores SIGINT, SIGTERM and SIGUSR1, also those that were held: the parent decides when this process ends."""
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def wait_for_end(process: int) -> None:
    """Waits until a process has ended, whether or not anybody has asked for its status."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        select.select([handle], [], [])
    finally:
        os.close(handle)
