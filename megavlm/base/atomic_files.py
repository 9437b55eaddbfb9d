"""Files and folders that appear either complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megavlm.base.errors import UserError


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends without an exception.

    The content is on disk before the rename, so a reader finds either the old file or the complete new one, even after
    a power failure. Text is written in UTF-8. Missing parent folders are created.

    Args:
        path: the file to write or replace.
        mode: "w" or "wb".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # writes the rename itself to disk
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (see `atomic_open`)."""
    with atomic_open(path) as file:
        file.write(text)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder ``OUT.partial``, which is renamed to `out` when the block ends without an exception.

    After an exception, including Ctrl-C, it is removed. An existing `out` is replaced; the caller must have checked
    that this is wanted.

    Raises:
        UserError: the parent folder of `out` is not writable.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left by an earlier run that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}") from None
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        replaced = out.with_name(out.name + ".replaced")
        out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced)
    else:
        partial.rename(out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
