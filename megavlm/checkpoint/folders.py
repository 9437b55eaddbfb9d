"""The folder of a run's checkpoints: names, completeness, and which checkpoints are kept.

A folder named step_N, such as ``step_00000100``, is always complete: a checkpoint gets this name when everything in it
is on disk. Until then its name is ``step_00000100.XXXXXXXX.partial``, where XXXXXXXX identifies the start of the run
that writes it. So a later start never writes into a folder that a killed start has left behind, even if a writer of
that start still runs on another machine. A checkpoint is renamed to ``….deleted`` before it is deleted. One that could
not be read when the run was resumed is renamed to ``….unreadable`` and kept, because the file system may have been at
fault. ``….held`` has further names of a checkpoint's files, for somebody who reads it while the run goes on (held.py).
``best`` is a link to the checkpoint with the best value of ``eval.best``, which is never deleted.
"""

import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d+)")
HELD = ".held"
_LONGEST_READ = 86_400.0  # seconds after which nobody reads what is held: its reader was killed
BEST = "best"


def latest(root: Path) -> Path | None:
    """Returns the newest readable checkpoint in ``root``, or None. Logs a warning for each newer, unreadable one."""
    for _, folder in reversed(_published(root)):
        try:
            McoreCheckpoint(folder).check_files()
            return folder
        except UserError as error:
            _log.warning("this checkpoint is skipped: %s", error.message)
    return None


def partial_folder(root: Path, step: int, start: str) -> Path:
    """Returns the folder in which the start of a run with this identifier writes the checkpoint of ``step``."""
    return root / f"step_{step:08}.{start}.partial"


def final_folder(partial: Path) -> Path:
    """Returns the name that the folder ``partial`` gets when the checkpoint is complete."""
    return partial.with_name(partial.name.partition(".")[0])


def publish(partial: Path, keep: int, keep_every: int | None, best: int | None = None) -> None:
    """Renames a complete checkpoint to its final name, and deletes checkpoints that are no longer kept.

    Checkpoints of later steps are set aside as ``….unreadable``: the run skipped them when it resumed. They stay until
    the user deletes them, so that no passing fault of the file system costs a checkpoint.

    Args:
        partial: the folder of the checkpoint, from ``partial_folder``.
        keep: the number of newest checkpoints to keep.
        keep_every: if set, checkpoints whose step is divisible by it are always kept.
        best: the step whose checkpoint is linked as ``best`` and kept; None: the link, and what it leads to, stay.
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
    if best is not None:
        link_best(root, best)
    linked = best_of(root)
    for number, path in others:
        forever = keep_every is not None and number % keep_every == 0
        if number > step:
            _set_aside(path)
        elif path in older[:-keep] and not forever and path != linked:
            _delete(path)
    clean(root)


def best_of(root: Path) -> Path | None:
    """The checkpoint that ``best`` leads to; None without such a link, or if it leads nowhere."""
    with suppress(OSError):
        path = root / os.readlink(root / BEST)
        return path if path.is_dir() else None
    return None


def link_best(root: Path, step: int) -> None:
    """Lets ``best`` lead to the checkpoint of this step, or to none if that does not exist. Atomic, and relative."""
    name, link, new = f"step_{step:08}", root / BEST, root / f"{BEST}.new"
    if not (root / name).is_dir():
        link.unlink(missing_ok=True)
    elif best_of(root) != root / name:
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        new.replace(link)
        _sync(root)


def mend_best(root: Path, best: int | None, last: int) -> tuple[int | None, list[str]]:
    """Lets ``best`` lead to a checkpoint that can be read when a run continues, or to none.

    Args:
        root: the folder of the checkpoints.
        best: the step that is to be linked; None: the link stays.
        last: the step from which the run continues; later ones are done again.

    Returns:
        The step to which it leads now, if any, and a warning if the link had to be taken away.
    """
    if not root.is_dir():
        return None, []
    if best is not None:
        link_best(root, best)
    linked = best_of(root)
    match = _NAME.fullmatch(linked.name) if linked is not None else None
    try:
        if linked is not None and match is not None and int(match[1]) <= last:
            McoreCheckpoint(linked).check_files()
            return int(match[1]), []
        cause = f"{linked.name} is done again" if linked is not None else "its checkpoint does not exist"
    except UserError as error:
        cause = error.message
    if not (root / BEST).is_symlink() and best is None:
        return None, []
    (root / BEST).unlink(missing_ok=True)
    return None, [f"checkpoints/best is gone until the next evaluation: {cause}"]


def clean(root: Path) -> None:
    """Deletes folders that earlier starts of the run left incomplete, and what killed readers have held."""
    for path in [
        *root.glob("step_*.partial"),
        *root.glob("step_*.deleted"),
        *filter(_is_forgotten, root.glob(f"step_*{HELD}")),
    ]:
        shutil.rmtree(path, ignore_errors=True)  # if a writer elsewhere still adds files, the next call deletes them


def _is_forgotten(held: Path) -> bool:
    try:
        return time.time() - held.stat().st_mtime > _LONGEST_READ
    except FileNotFoundError:  # its reader is done
        return False


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    names = (f"{folder.name}.unreadable{number}" for number in ("", *range(2, 100)))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(aside)
    _log.warning("%s could not be read when the run was resumed; it is kept as %s", folder, aside.name)


def _published(root: Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of all complete checkpoints in ``root``, sorted by step."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name)) and path.is_dir())


def _sync(folder: Path) -> None:
    """Waits until the names of the files in ``folder`` are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that ``path`` (``model.load``, ``model.adapter``) refers to.

    It is the newest checkpoint if ``path`` is the output folder of a run, the one that ``best`` leads to if ``path`` is
    that link, otherwise ``path`` itself.

    Raises:
        UserError: the run has no complete checkpoint.
    """
    if (path / "checkpoints").is_dir():
        newest = latest(path / "checkpoints")
        if newest is None:
            raise UserError(
                f"{path} is a run that has no complete checkpoint yet", "choose another run or a checkpoint"
            )
        return newest
    return (best_of(path.parent) or path) if path.name == BEST and path.is_symlink() else path
