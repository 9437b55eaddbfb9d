"""Reports a failure with a single readable message on the terminal, even if many processes fail."""

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
    """The failure of one worker.

    Attributes:
        rank: the rank of the worker.
        status: its exit status.
        message: the message of a UserError, or the traceback of another exception.
        remedy: what the user can do; None if unknown.
    """

    rank: int
    status: int
    message: str
    remedy: str | None = None


def show(message: str, remedy: str | None = None) -> None:
    """Prints a message on standard error, and what the user can do about it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if remedy:
        console.print(Text.assemble(("  → ", "bold green"), remedy))


def report(error: BaseException) -> int:
    """Reports an exception that ended the work of this process, and returns the exit status.

    A worker of `--nproc` passes the exception to its parent and waits until the parent ends it. If it exited at once
    and closed its connections, the other workers would fail in a collective and their messages would hide this one.
    Under torchrun or srun, a UserError is printed only by the first process that fails on a machine; a traceback is
    printed by each process.
    """
    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, UserError):
        failure = Failure(rank, error.status, error.message, error.remedy)
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        # A file or folder of the user's that no check has foreseen: not readable, not writable, of the wrong kind.
        named = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
        failure = Failure(rank, USER_ERROR, f"{named}: {error.strerror}", "check this path and its permissions")
    elif _ended_import_of("transformer_engine", error):
        # Megatron takes it if it is there, whichever kernels are asked for, and does not expect a part to be missing.
        message = f"Transformer Engine is installed, but cannot be imported: {type(error).__name__}: {error}"
        remedy = "install what it lacks; or uninstall transformer_engine, and model.kernels=auto takes plain PyTorch"
        failure = Failure(rank, USER_ERROR, message, remedy)
    else:
        failure = Failure(rank, OTHER_ERROR, "".join(traceback.format_exception(error)).rstrip())
    if folder := os.environ.get(FOLDER_VARIABLE):
        _hand_over(failure, Path(folder))
    elif failure.status == OTHER_ERROR and not isinstance(error, UserError):
        print(failure.message, file=sys.stderr)
    elif "RANK" not in os.environ or _first_on_this_machine():
        show(failure.message, failure.remedy)
    return failure.status


def first(folder: Path) -> Failure | None:
    """The earliest failure that a worker has written into `folder`, if any."""
    written = sorted(folder.glob("failure_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return Failure(**json.loads(written[0].read_text())) if written else None


def _hand_over(failure: Failure, folder: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    atomic_files.write_text(folder / f"failure_{failure.rank}.json", json.dumps(vars(failure)))
    time.sleep(60)  # the parent ends this process long before
    os._exit(failure.status)


def _ended_import_of(package: str, error: BaseException) -> bool:
    """Whether an exception was raised while a module of the package was being imported."""
    return any(
        frame.f_code.co_name == "<module>" and f"{frame.f_globals.get('__name__')}.".startswith(f"{package}.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _start_of_process() -> float:
    """The start time of this process in seconds since the epoch, from the kernel.

    It includes the time of imports, during which another process may already have reported a failure.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _first_on_this_machine() -> bool:
    """Whether no other process of our parent (torchrun agent or srun step) has reported a failure since we started.

    The processes share a file that is changed by each report. If its last change is older than this process, it belongs
    to an earlier job of the same parent.
    """
    path = Path(tempfile.gettempdir()) / f"megavlm-failed-{os.getuid()}-{os.getppid()}"
    try:
        with path.open("a") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX)
            state = os.fstat(marker.fileno())  # read it under the lock, because another process may have just reported
            was_shown = state.st_size > 0 and state.st_mtime > _start_of_process()
            if not was_shown:
                marker.write(".")
        return not was_shown
    except OSError:
        return True  # a repeated message is better than none
