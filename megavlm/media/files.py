"""Files by path or URL, and byte ranges of them: one interface for local files, object storage and shard members."""

import io
import os
import posixpath
from collections.abc import Buffer, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.media.retries import retried

_BUFFER_LOCAL, _BUFFER_REMOTE = 1 << 13, 1 << 16  # read-ahead in bytes; a picture's header fits into the local one


def is_url(path: str | Path) -> bool:
    """Whether the path has a protocol ("s3://…") and is read by fsspec; any other path is local."""
    return "://" in str(path)


@dataclass(frozen=True)
class File:
    """A file, or the bytes from ``start`` up to ``end`` of a file.

    No file handle stays open between reads, so the objects can be pickled to worker processes.

    Attributes:
        url: path, or URL with a protocol that fsspec supports.
        start: first byte.
        end: the byte after the last one; None: the end of the file.
        name: the name in messages if it differs from the url, as for a member of a shard.
        guard: what fsspec gets as ``get_client``, for a URL of http or https that a record has named
            (``access.PublicHosts``).
    """

    url: str
    start: int = 0
    end: int | None = None
    name: str | None = None
    guard: Callable[..., Any] | None = None

    def __str__(self) -> str:
        """The name in messages, shortened."""
        return shortened(self.name or self.url)

    @property
    def local_path(self) -> str | None:
        """The path if this is a complete local file, otherwise None."""
        return None if is_url(self.url) or self.start or self.end is not None else self.url

    def size(self) -> int:
        """Size in bytes. Raises OSError if the file does not exist."""
        if self.end is not None:
            return self.end - self.start
        if not is_url(self.url):
            return os.stat(self.url).st_size - self.start
        system, path = self._remote()
        try:
            size = retried(self.url, lambda: system.size(path))
        except FileNotFoundError as error:  # fsspec says so of every HTTP failure
            raise _permission(error) or error from None
        if size is None:
            raise OSError("the server does not tell its size")
        return size - self.start

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """All bytes or a range of them. Raises OSError, also if the file ends before ``self.end``."""
        first = self.start + start
        last = self.end if end is None else self.start + end
        if is_url(self.url):
            system, path = self._remote()
            data = retried(self.url, lambda: system.cat_file(path, start=first or None, end=last))
        else:
            with open(self.url, "rb", buffering=0) as file:
                file.seek(first)
                data = file.readall() if last is None else _read_all(file, last - first)
        if last is not None and len(data) < last - first and end is None:
            raise OSError(f"the file ends after {first + len(data)} bytes, but bytes {first} to {last} were expected")
        return data

    def open(self) -> BinaryIO:
        """A seekable stream of the bytes, which fetches them as they are read."""
        if self.local_path:
            return open(self.url, "rb")
        return io.BufferedReader(_Bytes(self), _BUFFER_REMOTE if is_url(self.url) else _BUFFER_LOCAL)

    def _remote(self) -> tuple[Any, str]:
        """fsspec's file system of the URL, and the path in it."""
        return fsspec.core.url_to_fs(self.url, **({} if self.guard is None else {"get_client": self.guard}))


@dataclass(frozen=True)
class HeldFile(File):
    """A file whose bytes are in memory; ``url`` is its name in messages."""

    data: bytes = field(default=b"", repr=False)

    @property
    def local_path(self) -> str | None:
        return None

    def size(self) -> int:
        return len(self.data)

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        return self.data[start:end]

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


def beside(file: str | Path, named: str) -> File:
    """The file that a line of `file` refers to as `named`: absolute, a URL, or relative to the folder of `file`."""
    if is_url(named) or posixpath.isabs(named):
        return File(named)
    return File(posixpath.join(posixpath.dirname(str(file)), named))


def in_folder(folder: str | Path) -> Callable[[str], File]:
    """A function that locates files by their names relative to a folder."""
    return partial(beside, f"{folder}/")


Find = Callable[[str], File]
"""A function that locates the media of a sample: it maps a name in the record to the file."""


def is_folder(path: str | Path) -> bool:
    """Whether a path or URL is a folder. Raises whatever fsspec raises."""
    if not is_url(path):
        return Path(path).is_dir()
    system, inside = fsspec.core.url_to_fs(str(path))
    return system.isdir(inside)


def _permission(error: BaseException | None) -> PermissionError | None:
    """The PermissionError among an exception and its causes, if there is one."""
    while error is not None and not isinstance(error, PermissionError):
        error = error.__cause__
    return error


def _read_all(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file. It loops because one read returns at most 2 GiB."""
    data = file.read(count)
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


class _Bytes(io.RawIOBase):
    """The raw stream behind ``File.open``."""

    def __init__(self, file: File):
        self._file, self._place, self._size = file, 0, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        last = min(self._place + len(view), self._size)
        data = self._file.read(self._place, last) if self._place < last else b""
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextmanager
def explained(source: str, what: str, file: File) -> Iterator[None]:
    """Converts any exception of a decoder to a UserError that names the sample, the file and the cause."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{source}: {what} {file} does not exist", "paths are absolute or relative to the folder of the data file"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: {what} {file} cannot be read: {shortened(error)}") from error
