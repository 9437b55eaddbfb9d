"""The parts that several processes or jobs write of one folder of shards: they are joined if they belong together."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.base.file_lock import FileLock
from megavlm.base.json_files import parse_json
from megavlm.media.files import File, is_url
from megavlm.sources.open_files import SampleFile

SKIPPED = "skipped.jsonl"
PART = "part.json"  # in each part: what it was made from,
UNUSABLE = "unusable"  # and, under this name, what of it no verb can use
_LOCK = ".partial.lock"
_INDEX_LOCK = "indexing.lock"
_NAME = re.compile(r"part-(\d{4,})-of-(\d{4,})(\.partial)?")


def folder_of(out: Path, part: tuple[int, int]) -> Path:
    """The folder of the i-th of n parts (i, n), from 0."""
    return out / f"part-{part[0] + 1:04}-of-{part[1]:04}"


def num_parts(folder: Path) -> int:
    """The number of the parts into which a folder was divided, if some of them are there; 0 if none is."""
    return next((count for _, count, _ in _found(folder).values()), 0)


def has_only_locks(folder: Path) -> bool:
    """Whether a folder exists and has nothing but the locks of parts."""
    return folder.is_dir() and all(path.name.endswith(_LOCK) for path in folder.iterdir())


def lock_of(folder: Path) -> FileLock:
    """The lock, beside a folder that does not exist yet, of the process that writes it."""
    place = folder.resolve()
    lock = place.with_name(place.name + _LOCK)
    return FileLock(lock, f"{folder}", "wait until it ends, or choose another --out")


def index_lock_of(folder: Path) -> FileLock:
    """The lock, inside a folder of shards, of the process that writes its index."""
    return FileLock(folder / _INDEX_LOCK, f"the index of {folder}", "wait until it ends")


def made_from(files: Sequence[SampleFile], num_parts: int, shard_bytes: int, skip_broken: bool) -> dict[str, Any]:
    """What all parts of one folder have in common, as ``part.json`` has it. Raises OSError if a file has gone."""
    names = [name for file in files for name in file.index_files]
    inputs = [[name if is_url(name) else os.path.abspath(name), File(name).size()] for name in names]
    return {"parts": num_parts, "inputs": inputs, "shard_bytes": shard_bytes, "skip_broken": skip_broken}


def check_siblings(out: Path, made: dict[str, Any]) -> None:
    """Raises UserError if `out` has parts that do not belong to those that are made like this."""
    for folder, (_, count, partial) in _found(out).items():
        there = (made if partial else _read(folder)) | {"parts": count}  # another job may be writing a partial one
        # A part that is complete without skip_broken has no broken sample.
        there["skip_broken"] = made["skip_broken"] or there.get("skip_broken")
        if different := [name for name in made if name != UNUSABLE and there.get(name) != made[name]]:
            raise UserError(
                f"{folder} was made from other files or settings ({', '.join(different)})",
                f"choose another --out, or move {out} away",
            )


def check_parts(out: Path) -> None:
    """Raises UserError if a folder has parts and they are not all there, or do not belong together."""
    found = _found(out)
    if not any((folder / PART).exists() for folder in found):
        return
    for folder, (number, count, partial) in found.items():
        if partial:
            raise UserError(
                f"{folder} is still being written, or its process was killed",
                f"wait for it, or run --part {number}/{count} again",
            )
    first = next(iter(found))
    check_siblings(out, _read(first) | {"skip_broken": True})
    count = found[first][1]
    if missing := sorted(set(range(1, count + 1)) - {number for number, _, _ in found.values()}):
        listed = ", ".join(f"{number}/{count}" for number in missing[:8]) + ", …" * (len(missing) > 8)
        raise UserError(f"{out} lacks {len(missing):,} of {count:,} parts: {listed}", "run these with --part first")


def join_skipped(out: Path) -> None:
    """Writes the lists of skipped samples of all parts, in their order, as one list into the folder."""
    lists = [folder / SKIPPED for folder in _found(out) if (folder / SKIPPED).exists()]
    if lists:
        with atomic_open(out / SKIPPED, "wb") as joined:
            for path in lists:
                joined.write(path.read_bytes())


def _found(out: Path) -> dict[Path, tuple[int, int, bool]]:
    """Number, number of all parts, and whether it is incomplete, for each part in a folder, in their order."""
    names = [match for path in out.glob("part-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    parts = {out / match[0]: (int(match[1]), int(match[2]), match[3] is not None) for match in names}
    return dict(sorted(parts.items(), key=lambda item: item[1]))


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(parse_json((folder / PART).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder} has no {PART} that says what it was made from", "move the folder away, and write all parts again"
        ) from None
