"""Writes records and their media into WebDataset shards; media are copied byte for byte."""

import io
import json
import os
import posixpath
import re
import tarfile
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from megavlm.base.errors import UserError
from megavlm.media.files import File, Find
from megavlm.media.pictures import Picture
from megavlm.media.videos import Video
from megavlm.records.records import rename_media
from megavlm.records.skipped_samples import SkippedSample
from megavlm.records.usable import check_usable
from megavlm.sources.blend import SampleFile

_THREADS = 16  # number of threads that read ahead, to hide the latency of network storage
_READ_AHEAD = 1 << 24  # bytes of one sample's media that are read ahead; the rest is read while it is written
_COPIED = 1 << 24  # bytes that are copied at a time for media that were not read ahead
_BLOCK = 512  # block size of a tar file in bytes
_EXTENSION = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass
class StoredSample:
    """A sample in the form in which it is written to a shard.

    Attributes:
        record: UTF-8 JSON in which the media are named by their parts ("0.jpg").
        media: for each media file, its part, the file, its size in bytes, and its content if it was read ahead.
        fault: why no verb can use the record; None if one can, as far as its form shows.
    """

    record: bytes
    media: list[tuple[str, File, int, bytes | None]]
    fault: SkippedSample | None = None

    @property
    def size(self) -> int:
        """Size of record and media in bytes."""
        return len(self.record) + sum(size for _, _, size, _ in self.media)


def load_sample(file: SampleFile, index: int) -> StoredSample:
    """Reads a record and, if they are small, its media.

    Raises UserError if any of them cannot be read, is not allowed (see ``MediaAccess``), or is no picture or video.
    """
    record, find = file.read(index)
    source, parts, read = file.source(index), _Parts(find), 0
    fault = fault_of(record, source)
    record = rename_media(record, parts.name)
    media = []
    for media_file, part in parts.names.items():
        try:
            size = media_file.size()
            read += size
            content = media_file.read() if read <= _READ_AHEAD else None
            _check_media(media_file if content is None else _Loaded(media_file.url, content=content))
        except Exception as error:  # each protocol of fsspec raises its own exceptions
            missing = isinstance(error, FileNotFoundError)
            found = "does not exist" if missing else f"cannot be read: {error or type(error).__name__}"
            raise UserError(
                f"{source}: {media_file} {found}",
                "paths are absolute or relative to the folder of the data file; use --skip-broken to leave out samples "
                "that cannot be read",
            ) from None
        media.append((part, media_file, size if content is None else len(content), content))
    # JSON may contain half a surrogate pair; it is written such that reading gives it back.
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return StoredSample(text, media, fault)


def fault_of(record: Any, source: str) -> SkippedSample | None:
    """Why no verb can use a record; None if one can, as far as its form shows."""
    try:
        check_usable(record, source)
    except UserError as error:
        return SkippedSample.of(0, source, error)
    return None


def load_ahead(files: Iterable[SampleFile], chosen: range) -> Generator[tuple[str, Future[StoredSample]]]:
    """For each chosen sample, in file order: its source and the future of its loading. Several load in parallel.

    Samples are numbered over all files.
    """
    places = islice(((file, index) for file in files for index in range(len(file))), chosen.start, chosen.stop)
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


@dataclass(frozen=True)
class _Loaded(File):
    """A file whose content is already in memory."""

    content: bytes = b""

    @property
    def local_path(self) -> str | None:
        return None

    def open(self) -> BinaryIO:
        return io.BytesIO(self.content)


def _check_media(file: File) -> None:
    """Raises ValueError unless the file begins like a picture or a video.

    A shard is passed on to others, so a record must not be able to bring any other file of this machine into it.
    """
    causes = []
    for header in (Picture(file, "").size, Video(file, [], None, "").probe):
        try:
            header()
            return
        except UserError as error:
            causes.append(str(error.__cause__ or error.message))
    raise ValueError(f"it is neither a picture ({causes[0]}) nor a video ({causes[1]})")


class ShardWriter:
    """Writes samples into ``shard-000000.tar``, ``shard-000001.tar``, …; the same samples always give the same bytes.

    Use it as a context manager; leaving the context completes the last shard.

    Args:
        folder: an empty folder.
        shard_bytes: maximum size of a shard; a larger sample gets a shard of its own.
        first: the number of the first sample; keys are numbers, which must differ between folders that are joined.
    """

    def __init__(self, folder: Path, shard_bytes: int, first: int = 0):
        self._folder, self._shard_bytes, self._first = folder, shard_bytes, first
        self.names: list[str] = []
        self.num_samples = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def add(self, sample: StoredSample) -> None:
        """Append a sample. Raises OSError, also if a file has become shorter since its size was read."""
        key = f"{self._first + self.num_samples:09}"
        members: list[tuple[str, int, bytes | File]] = [(f"{key}.json", len(sample.record), sample.record)]
        members += [(f"{key}.{part}", size, file if data is None else data) for part, file, size, data in sample.media]
        needed = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for _, size, _ in members)
        if self._tar is None or (self._tar.offset and self._tar.offset + needed > self._shard_bytes):
            self._close()
            self._tar = self._open()
        for name, size, content in members:
            member = tarfile.TarInfo(name)  # its defaults (time 0, no user, mode 644) make the bytes reproducible
            member.size = size
            try:
                with content.open() if isinstance(content, File) else io.BytesIO(content) as stream:
                    self._tar.addfile(member, stream)
            except OSError as error:
                raise OSError(f"{content if isinstance(content, File) else name}: {error}") from error
        # tarfile keeps all members for look-ups, which are not used here
        self._tar.members.clear()  # type: ignore[attr-defined]  # missing in the stubs
        self.num_samples += 1

    def _open(self) -> tarfile.TarFile:
        self.names.append(f"shard-{len(self.names):06}.tar")
        path = self._folder / self.names[-1]
        return tarfile.TarFile(path, "w", format=tarfile.GNU_FORMAT, copybufsize=_COPIED)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            with open(self._folder / self.names[-1], "rb") as stream:
                os.fsync(stream.fileno())


class _Parts:
    """Names the media of one sample by number and file extension; the same file always gets the same name."""

    def __init__(self, find: Find):
        self._find = find
        self.names: dict[File, str] = {}

    def name(self, named: str) -> str:
        file = self._find(named)
        extension = posixpath.splitext(re.split(r"[?#]", named)[0] if "://" in named else named)[1].lower()
        extension = extension if _EXTENSION.fullmatch(extension) else ".bin"
        return self.names.setdefault(file, f"{len(self.names)}{extension}")
