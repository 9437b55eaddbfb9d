"""How a failure is told: one readable message on the terminal, however many processes saw it."""

import fcntl
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megavlm.base import atomic_files
from megavlm.base.errors import UserError

USER_ERROR, OTHER_ERROR = 2, 1  # exit statuses
FOLDER_VARIABLE = "MEGAVLM_FAILURE_FOLDER"  # set for the workers that `--nproc` starts


@dataclass(frozen=True)
class Failure:
    """What one worker failed of. `remedy` is None, and `message` a traceback, unless the user can help it."""

    rank: int
    status: int
    message: str
    remedy: str | None = None


def show(message: str, remedy: str | None = None) -> None:
    """Prints a message, and what to do about it, on standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if remedy:
        console.print(Text.assemble(("  → ", "bold green"), remedy))


def report(error: BaseException) -> int:
    """Tells of an exception that ended this process's work, once per job and machine. Returns the exit status.

    A worker of `--nproc` gives it to its parent and waits to be ended, with its connections open: were it to leave
    at once, its peers would fail in the middle of a collective and bury the message under theirs. Under torchrun or
    srun, the first process on a machine to fail of bad input prints; a traceback is printed by every process.
    """
    user = isinstance(error, UserError)
    status = error.status if user else OTHER_ERROR
    rank = int(os.environ.get("RANK", 0))
    text = error.message if user else "".join(traceback.format_exception(error)).rstrip()
    failure = Failure(rank, status, text, error.remedy if user else None)
    if folder := os.environ.get(FOLDER_VARIABLE):
        _hand_over(failure, Path(folder))
    elif not user:
        print(text, file=sys.stderr)
    elif "RANK" not in os.environ or _first_on_this_machine():
        show(failure.message, failure.remedy)
    return status


def first(folder: Path) -> Failure | None:
    """The earliest failure that workers have written into `folder`."""
    written = sorted(folder.glob("failure_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return Failure(**json.loads(written[0].read_text())) if written else None


def _hand_over(failure: Failure, folder: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    atomic_files.write_text(folder / f"failure_{failure.rank}.json", json.dumps(vars(failure)))
    time.sleep(60)  # the parent ends us long before
    os._exit(failure.status)


def _start_of_process() -> float:
    """When this process began, in seconds since the epoch: however long imports take, a message since then is known."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _first_on_this_machine() -> bool:
    """Whether no other process of our parent (the torchrun agent, the srun step) has told of a failure since we began.

    They share a file whose last change is the last telling; an older one belongs to an earlier job of the same parent.
    """
    path = Path(tempfile.gettempdir()) / f"megavlm-failed-{os.getuid()}-{os.getppid()}"
    try:
        with path.open("a") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX)
            state = os.fstat(marker.fileno())  # now: another may have told while this one waited for the lock
            was_shown = state.st_size > 0 and state.st_mtime > _start_of_process()
            if not was_shown:
                marker.write(".")
        return not was_shown
    except OSError:
        return True  # a message too many is better than none
