"""The lock of a folder: of two processes that would write into it at the same time, one is refused.

The lock is a file with the host and the id of the process that holds it. The kernel locks it, too (flock), so a process
that was killed releases it at once. Not every shared file system passes this on to other hosts, so the file's
modification time is also renewed regularly as a sign of life.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json

BEAT_SECONDS = 20.0  # between signs of life
DEAD_SECONDS = 120.0  # without a sign of life, after which a process of another host counts as dead
_CERTAIN_SECONDS = 600.0  # the same if it passed before this start; more, because the clocks of hosts differ
_RELEASE_SECONDS = 3.0  # data workers of a process that was killed hold its lock until they have ended, too

_log = logging.getLogger(__name__)


class FileLock:
    """A lock. Use it as a context manager; ``take`` takes it, and the end of the block removes the file.

    Args:
        path: the file.
        what: what must not be written twice, for the message, such as "output runs/one".
        remedy: what the user of a second process can do.
    """

    def __init__(self, path: Path, what: str, remedy: str):
        self._path, self._what, self._remedy = path, what, remedy
        self._handle: int | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def take(self) -> None:
        """Takes the lock, and keeps it until the end of the block. Creates the folder in which the file lies.

        The lock of a process that has died is taken over. To find out whether a process of another host is alive, this
        waits for its next sign of life, at most ``DEAD_SECONDS``.

        Raises:
            UserError: another process holds the lock.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _RELEASE_SECONDS
        while not self._try():
            holder = _read(self._path)
            elsewhere = holder.get("host") not in (None, socket.gethostname())
            if elsewhere and self._is_dead(holder):
                self._path.unlink(missing_ok=True)
            elif elsewhere or time.monotonic() > deadline:
                raise self._refusal(holder)
            time.sleep(0.05)
        assert self._handle is not None
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{mine}\n".encode(), 0)
        threading.Thread(target=self._beat, name="file lock", daemon=True).start()

    def _try(self) -> bool:
        """Opens and locks the file. Returns False if a process holds it, or may hold it from another host."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError as error:
            supported = error.errno in (errno.EAGAIN, errno.EACCES)
            is_free = not supported and not _runs_here(_read(self._path))
        holder = _read(self._path)
        is_free = is_free and holder.get("host") in (None, socket.gethostname())
        if is_free and self._path.exists() and os.fstat(handle).st_ino == self._path.stat().st_ino:
            self._handle = handle
            return True
        os.close(handle)
        return False

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the process of another host gives no sign of life."""
        last = _modified(self._path)
        if time.time() > last + _CERTAIN_SECONDS:
            return True
        _log.warning("%s is the lock of %s; waiting for a sign of life", self._path, _words(holder))
        deadline = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < deadline:
            if _modified(self._path) != last:
                return not self._path.exists()  # it was removed, or renewed
            time.sleep(min(1.0, DEAD_SECONDS / 10))
        return True

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        age = max(0.0, time.time() - _modified(self._path))
        remedy = self._remedy
        if holder.get("host") != socket.gethostname():  # here, the lock of a dead process is taken over
            remedy += f"; if that process no longer exists, remove {self._path}"
        return UserError(
            f"{self._what} is in use by {_words(holder)}; its last sign of life was {age:.0f} s ago", remedy
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError as error:
                _log.warning("cannot renew %s: %s", self._path, error.strerror)

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._ended.set()
        if self._path.exists() and os.fstat(handle).st_ino == self._path.stat().st_ino:
            self._path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # for forked processes as well, which have the same handle
        os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    """The content of a lock file; {} if it is missing or not yet written."""
    try:
        found = parse_json(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '(unknown)')} on {holder.get('host', 'this host')}"


def _runs_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this host that is alive, for file systems without flock."""
    pid = holder.get("pid")
    return holder.get("host") == socket.gethostname() and isinstance(pid, int) and Path(f"/proc/{pid}").exists()
