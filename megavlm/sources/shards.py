"""Random access to the samples of WebDataset folders with megatron-energon's index (``.nv-meta``, ``*.tar.idx``).

A sample consists of adjacent members of a tar file whose names agree up to the first dot. ``KEY.json`` has the fields
of a JSONL line. The other members are the media. The record refers to them by the part of the name after the key
(``"images": ["0.jpg"]`` for ``KEY.0.jpg``); if it does not list them, they are used in their order in the file. If
there is ``KEY.txt`` instead of ``KEY.json``, it is a caption of the pictures.
"""

import struct
import tarfile
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find
from megavlm.records.marks import escaped
from megavlm.records.records import rename_media

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
INFO, INDEX = ".nv-meta/.info.json", ".idx"


class ShardFolder:
    """Random access to the samples of a folder of shards.

    Only the names and sample counts of the shards are in memory; a sample's position is read from its shard's index.

    Args:
        path: a path, or a URL that fsspec supports.
        access: which media the records may name beside the members of their own sample.

    Raises:
        UserError: the folder does not exist, or it has no index.
    """

    form: str | None = None
    read_with: tuple = ()

    def __init__(self, path: str | Path, access: MediaAccess = ANY_LOCAL_FILE):
        self.path, self._access = str(path).rstrip("/"), access
        try:
            counts = parse_json(File(f"{self.path}/{INFO}").read())["shard_counts"]
            _check_counts(counts)
        except FileNotFoundError:
            raise UserError(
                f"data folder {self.path} has no index of shards ({INFO})",
                f"build the index with: megavlm data prepare {self.path}",
            ) from None
        except Exception as error:  # each protocol of fsspec raises its own exceptions
            raise UserError(
                f"data folder {self.path}: {INFO} cannot be read: {shortened(repr(error))}",
                f"build the index again with: megavlm data prepare {self.path}",
            ) from None
        self._shards = list(counts)
        self._ends = list(accumulate(counts.values()))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"data folder {self.path} has no samples")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def index_files(self) -> list[str]:
        """The files that store the positions of the samples. They change when the samples change."""
        return [f"{self.path}/{name}" for name in (INFO, *(shard + INDEX for shard in self._shards))]

    def source(self, index: int) -> str:
        """ "shard:number" of sample `index`, with numbers from 1."""
        shard, number = self._locate(index)
        return f"{shard}:{number + 1}"

    def read(self, index: int) -> tuple[Any, Find]:
        """The record of sample `index`, and the function that locates its media. Raises UserError if unreadable."""
        shard, number = self._locate(index)
        try:
            parts = _parts(shard, number)
            return _record(parts), partial(_find, parts, shard, self.source(index), self._access)
        except Exception as error:  # of the tar file, its index, its JSON, or fsspec
            missing = isinstance(error, FileNotFoundError)
            found = "the shard does not exist" if missing else f"cannot be read: {shortened(error)}"
            raise UserError(
                f"{self.source(index)}: {found}", f"build the index again with: megavlm data prepare {self.path}"
            ) from None

    def _locate(self, index: int) -> tuple[str, int]:
        """The shard of a sample, and the number of the sample in this shard, from 0."""
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return f"{self.path}/{self._shards[number]}", index - first


def find_in_shard(shard: str, number: int, source: str, access: MediaAccess) -> Find:
    """The function that locates the media of sample `number` (from 0) of a shard. Raises UserError if unreadable."""
    try:
        return partial(_find, _parts(shard, number), shard, source, access)
    except Exception as error:  # of the tar file, its index, or fsspec
        raise UserError(f"{source}: cannot be read: {shortened(error)}") from None


def _find(parts: dict[str, File], shard: str, source: str, access: MediaAccess, named: str) -> File:
    """The member with this part or full name; if there is none, a file relative to the folder of the shard."""
    part = _part(parts, named)
    return parts[part] if part is not None else access.find(shard, source, named)


def _check_counts(counts: Any) -> None:
    """Raises ValueError unless it maps names of shards in the folder to numbers of samples."""
    for name, count in counts.items():
        if "::" in name or "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name[:200]!r} is not the name of a shard in this folder")
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"the number of samples of {name[:200]!r} is {str(count)[:50]}")


def _parts(shard: str, number: int) -> dict[str, File]:
    """The members of sample `number`, by the part of their names after the key."""
    start, end = struct.unpack("<QQ", File(shard + INDEX).read(8 * number, 8 * number + 16))
    parts = {}
    with File(shard, start, end).open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.isfile():
                name = member.name.rpartition("/")[2]
                part = name.partition(".")[2]
                first = start + member.offset_data
                parts[part.lower()] = File(shard, first, first + member.size, f"{shard}:{member.name}")
    if not parts:
        raise tarfile.ReadError("the shard has no members at the position in its index")
    return parts


def _record(parts: dict[str, File]) -> Any:
    media = {
        name: [part for part in parts if part.rpartition(".")[2] in kinds]
        for name, kinds in (("images", PICTURES), ("videos", VIDEOS))
    }
    if "json" in parts:
        record = parse_json(parts["json"].read())
        if isinstance(record, dict):
            named: set[str | None] = set()  # media that the record names already, as video frames or in message parts

            def note(name: str) -> str:
                named.add(_part(parts, name))
                return name

            rename_media(record, note)
            listed = {name: [part for part in found if part not in named] for name, found in media.items()}
            record = {name: found for name, found in listed.items() if found and name not in record} | record
        return record
    if "txt" in parts:
        marks = "<image>" * len(media["images"]) + "<video>" * len(media["videos"])
        text = escaped(escaped(parts["txt"].read().decode().strip(), "image"), "video")
        return {"text": marks + text, **media}
    raise ValueError(f"the sample has neither a .json nor a .txt member; its members are {', '.join(parts)}")


def _part(parts: dict[str, File], named: str) -> str | None:
    name = named.rpartition("/")[2]
    return next((part for part in (name.lower(), name.partition(".")[2].lower()) if part in parts), None)
