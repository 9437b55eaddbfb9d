"""Makes folders of WebDataset shards ready for training: indexes existing shards, or converts JSONL files to shards."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megavlm.base.atomic_files import new_folder, write_text
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.prepare.index_shards import check_writable, find_shards, index_shards, is_up_to_date
from megavlm.prepare.parts import (
    PART,
    SKIPPED,
    UNUSABLE,
    check_parts,
    check_siblings,
    folder_of,
    index_lock_of,
    join_skipped,
    lock_of,
    made_from,
)
from megavlm.prepare.write_shards import ShardWriter, fault_of, load_ahead
from megavlm.records.skipped_samples import SkippedSample, causes
from megavlm.sources.blend import SampleFile, evenly, open_file

_LOOKED_AT = 100  # samples of a folder of shards that are looked at
_KEPT = 1000  # samples whose causes are kept while JSONL files are written


class Unusable(NamedTuple):
    """Samples that no verb can use: their number, the number of samples that were looked at, and some of them."""

    number: int
    looked_at: int
    some: list[SkippedSample]


def told_later(unusable: Unusable) -> dict[str, Any]:
    """What the file ``PART`` of a part keeps of its unusable samples."""
    some = [asdict(sample) for sample in unusable.some[:_LOOKED_AT]]
    return {UNUSABLE: unusable._replace(some=[])._asdict() | {"some": some}}


def unusable_of_parts(folder: Path, count: int) -> Unusable:
    """The unusable samples of all parts. Raises UserError if none can be used."""
    every = Unusable(0, 0, [])
    for number in range(count):
        about = parse_json((folder_of(folder, (number, count)) / PART).read_text(encoding="utf-8"))[UNUSABLE]
        some = [SkippedSample(**sample) for sample in about["some"]]
        every = Unusable(every.number + about["number"], every.looked_at + about["looked_at"], [*every.some, *some])
    if every.number == every.looked_at:
        listed = "\n".join(causes(every.some))
        raise UserError(f"none of {every.number:,} samples in {folder} can be used:\n{listed}")
    return every


class ProgressBar(Protocol):
    """Shows the progress of one task; a context manager."""

    def __enter__(self) -> "ProgressBar": ...

    def __exit__(self, *exc: object) -> None: ...

    def advance(self, num_bytes: int = 0) -> None:
        """Counts one more item with this number of bytes."""


Progress = Callable[[str, int, str], ProgressBar]
"""Makes the progress bar of a task from its name, the number of its items and their unit."""


class NoProgress:
    """A progress bar that shows nothing."""

    def __init__(self, what: str, total: int, unit: str):
        pass

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def advance(self, num_bytes: int = 0) -> None:
        """Does nothing."""


def prepare(folder: Path, *, force: bool = False, progress: Progress = NoProgress) -> bool:
    """Indexes the shards of a folder, unless its index is up to date. Returns whether it built an index.

    Raises:
        UserError: there are no shards, or a shard is damaged; the parts of ``convert`` in the folder are not all there,
            or do not belong together; another process is indexing the folder.
    """
    check_parts(folder)
    shards = find_shards(folder)
    if not force and is_up_to_date(folder, shards):
        return False
    check_writable(folder)
    with index_lock_of(folder) as lock:
        lock.take()
        if not force and is_up_to_date(folder, shards):  # another process has just done it
            return False
        with progress("indexing", len(shards), "shards") as bar:
            index_shards(folder, shards, bar.advance)
        join_skipped(folder)
    return True


def check_samples(folder: Path) -> Unusable:
    """Looks at samples all over a folder of shards; returns those that no verb can use.

    Raises UserError if none of them can be used.
    """
    file = open_file(folder)
    places = evenly(len(file), _LOOKED_AT)
    found = []
    for index in places:
        source = file.source(index)
        try:
            fault = fault_of(file.read(index)[0], source)
        except UserError as error:
            fault = SkippedSample.of(0, source, error)
        found += [fault] if fault is not None else []
    if len(found) == len(places):
        raise UserError(
            f"the shards in {folder} are indexed, but none of {len(places)} inspected samples can be used:\n"
            + "\n".join(causes(found)),
            "a sample must have KEY.json (a line of JSONL) or KEY.txt (a caption), and media: KEY.jpg, KEY.0.jpg, …",
        )
    return Unusable(len(found), len(places), found)


def convert(
    jsonl: Sequence[str],
    out: Path,
    shard_bytes: int,
    *,
    access: MediaAccess = ANY_LOCAL_FILE,
    skip_broken: bool = False,
    part: tuple[int, int] = (0, 1),
    within: tuple[int, int] = (0, 1),
    index: bool = True,
    progress: Progress = NoProgress,
    tell: Callable[[Unusable], None] = lambda unusable: None,
) -> Path:
    """Writes the samples of JSONL files in their order, with their media, into a new folder of shards with an index.

    Training from this folder gives bitwise the same rows as training from the JSONL files.

    Args:
        jsonl: paths or URLs.
        out: the new folder; it must not exist, and it appears when it is complete.
        shard_bytes: maximum size of a shard.
        access: which media the samples may name.
        skip_broken: skip samples that cannot be read and list them in ``skipped.jsonl``, instead of raising.
        part: (i, n): write only the i-th of n parts of the samples, from 0, into the folder `out`/part-I-of-N. If that
            exists and was made from the same, it is left as it is. ``prepare(out)`` joins the parts.
        within: (i, n): the samples are not all, but the i-th of n parts of them, of which `part` is then a part.
        index: build the index of the folder; not needed for a part that is to be joined at once. Of such a part, any
            number of samples may be unusable: whoever joins the parts counts them (``told_later``).
        progress: shows the progress of writing and of indexing.
        tell: called at the end with the samples that were written although no verb can use them.

    Returns:
        The folder.

    Raises:
        UserError: `out` exists or has parts of something else, a sample cannot be read (with `skip_broken`: none can),
            no verb can use any of the samples, a shard cannot be written, or another process is writing the folder.
    """
    check_url(out)
    if part[1] == 1:
        check_new(out)
    files = [open_file(path, access) for path in jsonl]
    made = None
    if part[1] > 1:
        made = made_from(files, part[1], shard_bytes, skip_broken)
        check_siblings(out, made)
        out = folder_of(out, part)
    total = sum(map(len, files))
    number, count = within[0] * part[1] + part[0], within[1] * part[1]
    chosen = range(total * number // count, total * (number + 1) // count)
    if not chosen:
        raise UserError(f"there are {total:,} samples for {part[1]:,} parts", "choose fewer parts")
    try:
        with lock_of(out) as lock:
            lock.take()
            if made is not None and out.exists():
                return out
            check_new(out)  # now that nobody else writes it
            with new_folder(out) as partial:
                if made is not None:
                    write_text(partial / PART, json.dumps(made))
                unusable = _write(files, chosen, partial, shard_bytes, skip_broken, progress, may_be_empty=not index)
                if made is not None:  # a part that is joined later tells then what of it cannot be used
                    write_text(partial / PART, json.dumps(made | told_later(unusable)))
                if index:
                    prepare(partial, progress=progress)
                check_new(out)  # a part may have been written meanwhile, into a folder of this name
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}", "free some space, or choose another --out") from None
    tell(unusable)
    return out


def check_url(out: Path) -> None:
    """Raises UserError if a folder for shards is a URL."""
    if ":/" in str(out):
        raise UserError(
            f"--out {out} is a URL, but shards are written to a local folder",
            "give a local folder, and copy it afterwards",
        )


def check_new(out: Path) -> None:
    """Raises UserError if a folder for shards exists."""
    if out.exists():
        raise UserError(f"{out} exists already", "choose another --out, or move it away")


def _write(
    files: Sequence[SampleFile],
    chosen: range,
    folder: Path,
    shard_bytes: int,
    skip_broken: bool,
    progress: Progress,
    *,
    may_be_empty: bool,
) -> Unusable:
    """Writes the chosen samples into an empty folder; see ``convert``. Returns those that no verb can use."""
    unusable, number = [], 0
    with (
        progress("writing", len(chosen), "samples") as bar,
        ShardWriter(folder, shard_bytes, chosen.start) as writer,
        closing(load_ahead(files, chosen)) as loading,
    ):
        for source, future in loading:
            try:
                sample = future.result()
            except UserError as error:
                if not skip_broken:
                    raise
                with (folder / SKIPPED).open("a", encoding="utf-8") as file:
                    line = {"sample": source, "cause": SkippedSample.of(0, source, error).cause}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.advance()
                continue
            writer.add(sample)
            bar.advance(sample.size)
            if sample.fault is not None:
                number += 1
                unusable += [sample.fault] if number <= _KEPT else []
    if may_be_empty:
        return Unusable(number, writer.num_samples, unusable)
    names = ", ".join(file.path for file in files)
    if not writer.num_samples:
        raise UserError(f"no sample of {names} can be read", "run without --skip-broken to see why")
    if number == writer.num_samples:
        listed = "\n".join(causes(unusable))
        raise UserError(f"none of {number:,} samples of {names} can be used:\n{listed}")
    return Unusable(number, writer.num_samples, unusable)
