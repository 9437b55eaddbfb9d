"""The lock of a run's output folder: of two starts that would write into it at the same time, one is refused."""

from pathlib import Path

from megavlm.base.file_lock import FileLock

FILE = "run.lock"


class RunLock(FileLock):
    """The lock of an output folder. ``take`` it on the one rank that writes.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path):
        super().__init__(folder / FILE, f"output {folder}", "wait until it ends, or choose another output")


def check_unlocked(folder: Path) -> None:
    """Raises the UserError of ``RunLock.take`` if a process holds the lock. Removes the lock of a dead process."""
    if (folder / FILE).exists():
        with RunLock(folder) as lock:
            lock.take()
