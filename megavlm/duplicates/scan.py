"""Reads all samples of data sources for their signatures, in blocks that are kept, by several processes or machines."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.base.pools import in_processes
from megavlm.duplicates.signatures import NUM_HASHES, equality, look_of, min_hashes, words_of
from megavlm.media.files import File, Find, is_url
from megavlm.records.records import rename_media
from megavlm.sources.blend import SampleFile

_BLOCK = 512  # samples
_MOST_READ = 1 << 26  # bytes of a picture or video that are compared; of a longer one, its first bytes and its size


@dataclass
class Signatures:
    """Signatures of samples in their order.

    Attributes:
        text: uint64 [samples], equal for equal words.
        media: uint64 [samples], equal for equal pictures and videos in the same order; 0: none.
        hashes: uint32 [samples, NUM_HASHES], see ``min_hashes``.
        readable: bool [samples], whether the record and its media were read.
        owner: int64 [pictures], the number of the sample of each picture.
        picture: uint64 [pictures], equal for equal files.
        look: uint64 [pictures], see ``look_of``; 0: unknown.
    """

    text: np.ndarray
    media: np.ndarray
    hashes: np.ndarray
    readable: np.ndarray
    owner: np.ndarray
    picture: np.ndarray
    look: np.ndarray


def scan(
    files: Sequence[SampleFile],
    workers: int,
    part: tuple[int, int] = (0, 1),
    told: Callable[[int, int], None] = lambda done, count: None,
) -> None:
    """Computes the blocks of signatures that are not kept yet in the cache (``$MEGAVLM_CACHE``).

    Args:
        files: the files.
        workers: the number of processes.
        part: (i, n): only every n-th block, from block i on; other machines with the same cache compute the others.
        told: called with the numbers of finished blocks and of all blocks of this part.

    Raises UserError if the cache cannot be written, or a process dies.
    """
    blocks = [block for block in _blocks(files)[part[0] :: part[1]] if not block[2].exists()]

    def work(number: int) -> None:
        file, first, path = blocks[number]
        found = _signatures(file, range(first, min(first + _BLOCK, len(file))))
        try:
            with atomic_open(path, "wb") as out:
                np.savez(out, **vars(found))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}", "free some space, or set MEGAVLM_CACHE to another folder"
            ) from None

    for done, _ in enumerate(in_processes(work, len(blocks), workers, "reading samples"), start=1):
        told(done, len(blocks))


def signatures(files: Sequence[SampleFile]) -> Signatures:
    """The signatures of all samples of the files, one file after the other; all must have been scanned."""
    found: list[dict[str, np.ndarray]] = []
    first = 0
    for _, _, path in _blocks(files):
        with np.load(path) as kept:
            block = dict(kept)
        block["owner"] = block["owner"] + first
        first += len(block["text"])
        found.append(block)
    return Signatures(**{name: np.concatenate([block[name] for block in found]) for name in found[0]})


def _blocks(files: Sequence[SampleFile]) -> list[tuple[SampleFile, int, Path]]:
    """Each block's file, first sample, and path in the cache."""
    root = Path(os.environ.get("MEGAVLM_CACHE") or Path.home() / ".cache" / "megavlm") / "signatures"
    return [
        (file, first, root / _identity(file) / f"{first:012}.npz")
        for file in files
        for first in range(0, len(file), _BLOCK)
    ]


def _identity(file: SampleFile) -> str:
    """Differs if the files of a source are others, or were changed, or are read in another way."""
    found = hashlib.sha256(repr((len(file), file.form, file.read_with)).encode())
    for name in file.index_files:
        changed = None
        if not is_url(name):
            with suppress(OSError):
                changed = os.stat(name).st_mtime_ns
            name = os.path.abspath(name)
        found.update(repr((name, changed)).encode())
    return found.hexdigest()[:32]


def _signatures(file: SampleFile, indices: range) -> Signatures:
    count = len(indices)
    found = Signatures(
        text=np.zeros(count, np.uint64),
        media=np.zeros(count, np.uint64),
        hashes=np.zeros((count, NUM_HASHES), np.uint32),
        readable=np.zeros(count, bool),
        owner=np.empty(0, np.int64),
        picture=np.empty(0, np.uint64),
        look=np.empty(0, np.uint64),
    )
    pictures: list[tuple[int, int, int]] = []
    for place, index in enumerate(indices):
        try:
            record, find = file.read(index)
            words, media = words_of(record), _media(record, find)
        except MemoryError:
            raise
        except Exception:  # whatever a file contains; the inspection of samples names what cannot be used
            continue
        found.text[place], found.hashes[place] = equality(" ".join(words).encode("utf-8", "replace")), min_hashes(words)
        if media:
            found.media[place] = equality(repr([same for same, _ in media]).encode())
        found.readable[place] = True
        pictures += [(place, same, look or 0) for same, look in media]
    if pictures:
        owner, picture, look = zip(*pictures, strict=True)
        found.owner, found.picture = np.array(owner, np.int64), np.array(picture, np.uint64)
        found.look = np.array(look, np.uint64)
    return found


def _media(record: object, find: Find) -> list[tuple[int, int | None]]:
    """For each picture or video that a record names: the bits for equality and the look."""
    named: list[str] = []
    rename_media(record, lambda name: named.append(name) or name)  # type: ignore[func-returns-value]  # append's None
    return [_medium(find(name)) for name in named]


def _medium(file: File) -> tuple[int, int | None]:
    size = file.size()
    return equality(file.read(0, min(size, _MOST_READ)) + str(size).encode()), look_of(file)
