"""Makes sure that a process does not outlive the one that it works for."""

import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent dies, even if the parent is killed by SIGKILL.

    Args:
        parent: process id of the parent, if known. If the parent has already ended, this process ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


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
