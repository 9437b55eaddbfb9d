"""New folders that appear either complete or not at all, and the progress bar of the conversions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megavlm.base import atomic_files
from megavlm.base.errors import UserError


@contextmanager
def new_folder(out: Path, *, overwrite: bool, mark: str) -> Iterator[Path]:
    """Checks that ``out`` may be written and then does the same as `megavlm.base.atomic_files.new_folder`.

    Args:
        out: the folder to create.
        overwrite: whether to replace an existing ``out``, which must contain the file ``mark``.
        mark: a file that every complete result contains, so that no other folder is replaced.

    Raises:
        UserError: ``out`` exists and may not be replaced, or its parent folder is not writable.
    """
    if out.exists():
        if not overwrite:
            raise UserError(f"{out} exists already", "choose another --out, or give --overwrite to replace it")
        if not (out / mark).is_file():
            raise UserError(f"{out} exists and holds no {mark}, so it is not replaced", "choose another --out")
    with atomic_files.new_folder(out) as partial:
        yield partial


@contextmanager
def progress_bar(description: str, total_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error. Yields the function that advances it by a number of bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(description, total=total_bytes)
        yield lambda nbytes: progress.advance(task, nbytes)
