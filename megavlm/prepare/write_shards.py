"""Shards written from records and their media, which are copied byte for byte."""

import io
import json
import os
import posixpath
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.data.files import File
from megavlm.data.media import Find
from megavlm.data.records import rename_media
from megavlm.data.sources import SampleFile

_THREADS = 16  # that read ahead: on a network, one after the other would wait most of the time
_READ_AHEAD = 1 << 24  # bytes of one sample's media that are read ahead; larger ones while they are written
_COPIED = 1 << 24  # bytes of these at a time
_BLOCK = 512  # of a tar file
_EXTENSION = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass
class StoredSample:
    """A sample as it goes into a shard.

    Attributes:
        record: UTF-8 JSON that names the media by their parts ("0.jpg").
        media: part, file, bytes in it, and its content where that was read ahead.
    """

    record: bytes
    media: list[tuple[str, File, int, bytes | None]]

    @property
    def size(self) -> int:
        """Bytes of record and media."""
        return len(self.record) + sum(size for _, _, size, _ in self.media)


def load_sample(file: SampleFile, index: int) -> StoredSample:
    """Reads a record and, as far as they are small, its media. Raises UserError if one cannot be read."""
    record, find = file.read(index)
    source, parts, read = file.source(index), _Parts(find), 0
    record = rename_media(record, parts.name)
    media = []
    for media_file, part in parts.names.items():
        try:
            size = media_file.size()
            read += size
            content = media_file.read() if read <= _READ_AHEAD else None
        except Exception as error:  # fsspec has as many exceptions as protocols
            missing = isinstance(error, FileNotFoundError)
            found = "does not exist" if missing else f"cannot be read: {error or type(error).__name__}"
            raise UserError(
                f"{source}: {media_file} {found}",
                "paths are absolute or relative to the folder of the data file; --skip-broken leaves such samples out",
            ) from None
        media.append((part, media_file, size if content is None else len(content), content))
    # Half a surrogate pair, which JSON may contain, is written as it will be read.
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return StoredSample(text, media)


def load_ahead(files: Iterable[SampleFile]) -> Iterator[tuple[str, Future[StoredSample]]]:
    """The source and the loading of each sample, in the order of the files; some of them at work at a time."""
    places = ((file, index) for file in files for index in range(len(file)))
    pending: deque[tuple[str, Future[StoredSample]]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for file, index in places:
            pending.append((file.source(index), pool.submit(load_sample, file, index)))
            if len(pending) >= _THREADS:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writes samples into ``shard-000000.tar``, ``shard-000001.tar``, …; the same samples always give the same bytes.

    A context manager: its end completes the last shard.

    Args:
        folder: an empty folder.
        shard_bytes: size of a shard; a sample that is larger has one to itself.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self.names: list[str] = []
        self.num_samples = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def add(self, sample: StoredSample) -> None:
        """Raises OSError, also where a file has become shorter."""
        key = f"{self.num_samples:09}"
        members = [(f"{key}.json", len(sample.record), sample.record)]
        members += [(f"{key}.{part}", size, file if data is None else data) for part, file, size, data in sample.media]
        needed = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for _, size, _ in members)
        if self._tar is None or (self._tar.offset and self._tar.offset + needed > self._shard_bytes):
            self._close()
            self._open()
        for name, size, content in members:
            member = tarfile.TarInfo(name)  # of no time, no user and mode 644
            member.size = size
            try:
                with content.open() if isinstance(content, File) else io.BytesIO(content) as stream:
                    self._tar.addfile(member, stream)
            except OSError as error:
                raise OSError(f"{content if isinstance(content, File) else name}: {error}") from error
        self._tar.members.clear()  # kept for looking up, and nobody does
        self.num_samples += 1

    def _open(self) -> None:
        self.names.append(f"shard-{len(self.names):06}.tar")
        path = self._folder / self.names[-1]
        self._tar = tarfile.TarFile(path, "w", format=tarfile.GNU_FORMAT, copybufsize=_COPIED)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            with open(self._folder / self.names[-1], "rb") as stream:
                os.fsync(stream.fileno())


class _Parts:
    """Names the media of one sample by number and ending; the same file gets the same name."""

    def __init__(self, find: Find):
        self._find = find
        self.names: dict[File, str] = {}

    def name(self, named: str) -> str:
        file = self._find(named)
        extension = posixpath.splitext(re.split(r"[?#]", named)[0] if "://" in named else named)[1].lower()
        extension = extension if _EXTENSION.fullmatch(extension) else ".bin"
        return self.names.setdefault(file, f"{len(self.names)}{extension}")
