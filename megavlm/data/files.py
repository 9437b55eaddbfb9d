"""Files by path or URL, and pieces of them: one way to read a local picture, one on S3, and a member of a shard."""

import io
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import fsspec

_BUFFER_LOCAL, _BUFFER_REMOTE = 1 << 13, 1 << 16  # bytes read ahead; a picture's header fits in the first


def is_url(path: str | Path) -> bool:
    """Whether fsspec reads it, by its protocol ("s3://…"); anything else is a local path."""
    return "://" in str(path)


@dataclass(frozen=True)
class File:
    """A file, or the bytes from ``start`` up to ``end`` of one.

    Nothing is open between reads, so that objects go to worker processes and back as they are.

    Attributes:
        url: path, or URL with a protocol that fsspec knows.
        start, end: piece of the file; end None: up to its end.
        name: how messages call it where that is not the url, as for a member of a shard.
    """

    url: str
    start: int = 0
    end: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        return self.name or self.url

    @property
    def local_path(self) -> str | None:
        """The path, if this is the whole of a local file."""
        return None if is_url(self.url) or self.start or self.end is not None else self.url

    def size(self) -> int:
        """Bytes. Raises OSError if there is no such file."""
        if self.end is not None:
            return self.end - self.start
        whole = fsspec.core.url_to_fs(self.url)
        size = whole[0].size(whole[1]) if is_url(self.url) else os.stat(self.url).st_size
        return size - self.start

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """The bytes, or some of them. Raises OSError, and where the file ends before the piece does."""
        first = self.start + start
        last = self.end if end is None else self.start + end
        if is_url(self.url):
            system, path = fsspec.core.url_to_fs(self.url)
            data = system.cat_file(path, start=first or None, end=last)
        else:
            with open(self.url, "rb", buffering=0) as file:
                file.seek(first)
                data = file.readall() if last is None else _read_all(file, last - first)
        if last is not None and len(data) < last - first and end is None:
            raise OSError(f"the file ends after {first + len(data)} bytes, but this lies at {first} to {last}")
        return data

    def open(self) -> BinaryIO:
        """A seekable stream of the bytes, which are fetched as they are read."""
        if self.local_path:
            return open(self.url, "rb")
        return io.BufferedReader(_Bytes(self), _BUFFER_REMOTE if is_url(self.url) else _BUFFER_LOCAL)


def beside(file: str | Path, named: str) -> File:
    """The file that `named` means in a line of `file`: absolute, a URL, or relative to the folder of `file`."""
    if is_url(named) or posixpath.isabs(named):
        return File(named)
    return File(posixpath.join(posixpath.dirname(str(file)), named))


def in_folder(folder: str | Path) -> Callable[[str], File]:
    """Finds files by their names relative to a folder."""
    return partial(beside, f"{folder}/")


def is_folder(path: str | Path) -> bool:
    if not is_url(path):
        return Path(path).is_dir()
    system, inside = fsspec.core.url_to_fs(str(path))
    return system.isdir(inside)


def _read_all(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file: one read gives at most 2 GiB."""
    data = file.read(count)
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


class _Bytes(io.RawIOBase):
    """The stream under ``File.open``."""

    def __init__(self, file: File):
        self._file, self._place, self._size = file, 0, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer) -> int:
        last = min(self._place + len(buffer), self._size)
        data = self._file.read(self._place, last) if self._place < last else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
