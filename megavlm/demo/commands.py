"""Common parts of the demos: their folder, and commands that are printed as a user would type them and then run."""

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
OUT_VARIABLE = "MEGAVLM_DEMO"  # the environment variable from which configs/demo/*.yaml take the folder
CONFIGS = Path("configs/demo")
CLONE = Path(__file__).parents[2]
NPROC = ("--nproc", "2")  # the number of processes for which configs/demo are intended

console = Console(highlight=False, soft_wrap=True)


class CommandFailed(Exception):
    """A command of the demo ended with a status other than 0; it has printed the reason itself."""


def work_in(out: Path) -> Path:
    """Changes to the top folder of the clone, in which commands run, and returns `out` relative to it if possible.

    Raises UserError if configs/demo is missing, because the package was installed without a clone.
    """
    if not (CLONE / CONFIGS).is_dir():
        raise UserError(f"{CLONE} has no folder {CONFIGS}", "run the demo from a clone of the repository")
    out = out.absolute()
    out = out.relative_to(CLONE) if out.is_relative_to(CLONE) else out
    os.environ[OUT_VARIABLE] = str(out)
    os.chdir(CLONE)
    return out


def show_variable(out: Path) -> None:
    """Prints the environment variable that the following commands need, unless it has its default value."""
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


def at_least(what: str, measured: float, bound: float) -> bool:
    """Prints a share and the bound that it must reach. Returns whether it does."""
    return result(what, measured, "≥", bound, measured >= bound - 1e-9)  # tolerates rounding errors in computed bounds


def result(what: str, measured: float, sign: str, bound: float, kept: bool) -> bool:
    """Prints a share, its bound and whether it is kept, which is returned."""
    console.print(f"  {what:52} {measured:6.1%}   {sign} {bound:5.1%}   {'kept' if kept else 'MISSED'}")
    return kept


def minutes(seconds: float) -> str:
    """A duration as text."""
    minutes, rest = divmod(round(seconds), 60)  # rounded first, or 179.6 s would be 2 min 60 s
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def status_of(job: Callable[[], bool]) -> int:
    """Runs a job that returns whether it passed, prints the result or the error, and returns the exit status."""
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
