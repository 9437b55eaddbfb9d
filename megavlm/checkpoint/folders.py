"""The folder of a run's checkpoints: their names, which of them is whole, and which are kept.

``step_00000100`` is complete: it got that name when everything in it was on disk. It is written as
``step_00000100.XXXXXXXX.partial``, named after the start of the run that writes it, so that what a killed start left
behind (even a writer of it that still runs, on another machine) is never written into. One that is to go is renamed to
``….deleted`` first, so that it is never met half deleted.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d+)")


def latest(root: Path) -> Path | None:
    """The newest readable checkpoint in ``root``; None if there is none. Names those it passes over in warnings."""
    for _, folder in reversed(_published(root)):
        try:
            McoreCheckpoint(folder).check_files()
            return folder
        except UserError as error:
            _log.warning("passed over: %s", error.message)
    return None


def partial_folder(root: Path, step: int, start: str) -> Path:
    """Where the checkpoint of ``step`` is written by the ``start`` of a run."""
    return root / f"step_{step:08}.{start}.partial"


def final_folder(partial: Path) -> Path:
    """The name that ``partial`` gets once it is whole."""
    return partial.with_name(partial.name.partition(".")[0])


def publish(partial: Path, keep: int, keep_every: int | None) -> None:
    """Give a whole checkpoint its name, and delete what is no longer kept.

    Later steps than its own are unreadable ones, that the run passed over when it resumed: they go too.
    """
    final, root = final_folder(partial), partial.parent
    _sync(partial)
    if final.exists():
        _delete(final)
    partial.rename(final)
    _sync(root)
    match = _NAME.fullmatch(final.name)
    assert match is not None, f"{partial} is not from partial_folder"
    step, others = int(match[1]), _published(root)
    older = [path for number, path in others if number <= step]
    for number, path in others:
        forever = keep_every is not None and number % keep_every == 0
        if number > step or (path in older[:-keep] and not forever):
            _delete(path)
    clean(root)


def clean(root: Path) -> None:
    """Delete what earlier starts of the run left half written or half deleted."""
    for path in [*root.glob("step_*.partial"), *root.glob("step_*.deleted")]:
        shutil.rmtree(path, ignore_errors=True)  # a writer elsewhere may still add to it: next time, then


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _published(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in ``root`` that bears a final name, by step."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name)) and path.is_dir())


def _sync(folder: Path) -> None:
    """The names in ``folder`` are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_checkpoint(path: Path) -> Path:
    """``path`` (``model.load``, ``model.adapter``) as a checkpoint: itself, or the newest one of the run it names."""
    if (path / "checkpoints").is_dir():
        newest = latest(path / "checkpoints")
        if newest is None:
            raise UserError(f"{path} is a run that has no complete checkpoint yet", "name another one")
        return newest
    return path
