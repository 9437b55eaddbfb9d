"""What the demos share: the folder they work in, and commands that are printed as a user would type them, then run."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megavlm.base.errors import UserError
from megavlm.cli import failures

DEFAULT_OUT = "demo-output"
OUT_VARIABLE = "MEGAVLM_DEMO"  # configs/demo/*.yaml take it for the folder
CONFIGS = Path("configs/demo")
CLONE = Path(__file__).parents[2]
NPROC = ("--nproc", "2")  # for which configs/demo are meant

console = Console(highlight=False, soft_wrap=True)


class CommandFailed(Exception):
    """A command of the demo ended with another status than 0; it has said why itself."""


def work_in(out: Path) -> Path:
    """Goes to the top of the clone, where commands run and relative paths start; returns `out` as seen from there.

    Raises UserError without configs/demo (an installed package instead of a clone).
    """
    if not (CLONE / CONFIGS).is_dir():
        raise UserError(f"{CLONE} holds no {CONFIGS}", "run the demo from a clone of the repository")
    out = out.absolute()
    out = out.relative_to(CLONE) if out.is_relative_to(CLONE) else out
    os.environ[OUT_VARIABLE] = str(out)
    os.chdir(CLONE)
    return out


def show_variable(out: Path) -> None:
    """Prints what the commands below rest on, where it is not the default."""
    if str(out) != DEFAULT_OUT:
        console.print(Text(f"\n$ export {OUT_VARIABLE}={shlex.quote(str(out))}", "bold"))


def run(*command: str | Path) -> None:
    """Prints a command as a user would type it, and runs it with this Python. Raises CommandFailed."""
    typed = [str(part) for part in command]
    console.print(Text(f"\n$ {shlex.join(typed)}", "bold"))
    programs = {"python": [sys.executable], "megavlm": [sys.executable, "-m", "megavlm"]}
    began = time.perf_counter()
    status = subprocess.run([*programs[typed[0]], *typed[1:]]).returncode
    if status:
        raise CommandFailed(f"{shlex.join(typed)} ended with status {status}")
    console.print(Text(f"({minutes(time.perf_counter() - began)})", "dim"))


def minutes(seconds: float) -> str:
    """A duration to be read."""
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def status_of(job: Callable[[], bool]) -> int:
    """The exit status of a job that says whether it passed: 0 or 1; what went wrong on its way is told in a message."""
    began = time.perf_counter()
    try:
        passed = job()
    except UserError as error:
        failures.show(error.message, error.remedy)
        return 2
    except CommandFailed as error:
        failures.show(str(error))
        return 1
    console.print(f"\n{'passed' if passed else 'FAILED'} in {minutes(time.perf_counter() - began)}")
    return 0 if passed else 1
