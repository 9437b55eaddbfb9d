"""A checkpoint that stays readable while it is read, although the run that wrote it goes on and may delete it."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from megavlm.checkpoint.folders import HELD

_log = logging.getLogger(__name__)
# What a file system answers that knows no further names, or allows them to the owner of a file alone.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EROFS, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


@contextmanager
def held(checkpoint: Path) -> Iterator[Path]:
    """Yields a folder with the files of a run's checkpoint, which ``checkpoint.keep`` does not delete.

    The folder, ``step_00000100.XXXXXXXX.held`` beside the checkpoint, has further names (hard links) of the same files.
    They take no space, and the run need not know of them: deleting a file removes one of its names. The folder is
    removed at the end of the block, and one of a reader that was killed by ``folders.clean``.

    Other folders than checkpoints of a run are yielded themselves. So is a checkpoint whose file system has no links or
    allows none to this user, with a warning.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or was deleted before its files had further names.
    """
    place = checkpoint.resolve()  # which may be a link to the folder
    if not place.name.startswith("step_") or place.parent.name != "checkpoints":
        yield checkpoint
        return
    kept = place.with_name(f"{place.name}.{uuid4().hex[:8]}{HELD}")
    try:
        yield kept if _linked(place, kept) else checkpoint
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _linked(checkpoint: Path, kept: Path) -> bool:
    """Gives all files of a checkpoint further names in a new folder. Returns False where this is not possible.

    A checkpoint is renamed before it is deleted, so either all of its files are found under its name, or one is missing
    by then.
    """
    try:
        kept.mkdir()
        for file in sorted(checkpoint.rglob("*")):
            target = kept / file.relative_to(checkpoint)
            if file.is_dir():
                target.mkdir()
            else:
                os.link(file, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _log.warning(
            "the files of %s cannot be kept (%s): if the run goes on, it may delete them meanwhile (checkpoint.keep)",
            checkpoint,
            error.strerror,
        )
        return False
    if not (kept / "metadata.json").is_file():
        raise FileNotFoundError(errno.ENOENT, "it is no complete checkpoint", str(checkpoint))
    return True
