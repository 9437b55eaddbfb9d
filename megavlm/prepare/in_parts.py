"""Shards written by several processes of this machine: each writes a part of the samples, then the next one."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.pools import in_processes, num_cores
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.prepare.parts import PART, check_siblings, folder_of, has_only_locks, lock_of, made_from, num_parts
from megavlm.prepare.shard_folder import (
    NoProgress,
    Progress,
    Unusable,
    check_new,
    check_url,
    convert,
    prepare,
    unusable_of_parts,
)
from megavlm.sources.blend import open_file

SMALL = 2000  # fewer samples are written by one process unless it is told otherwise
_PARTS = 4  # for each process, of large data: an interruption then costs little, and no process waits long for others


def convert_in_parts(
    jsonl: Sequence[str],
    out: Path,
    shard_bytes: int,
    workers: int | None,
    *,
    access: MediaAccess = ANY_LOCAL_FILE,
    skip_broken: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Progress = NoProgress,
    tell: Callable[[Unusable], None] = lambda unusable: None,
) -> Path:
    """Does what ``convert`` does, by several processes if there is enough to do, and goes on where it was interrupted.

    The folder, or that of `part`, then has a folder for each part that was written, and one index.

    Args:
        jsonl, out, shard_bytes, access, skip_broken, part, progress, tell: see ``convert``.
        workers: the number of processes; None: one for each core, but one alone for fewer than ``SMALL`` samples.

    Returns:
        The folder.

    Raises:
        UserError: see ``convert``. Parts that were complete are kept, and so are those that other processes were just
            writing.
    """
    check_url(out)
    done = out if part[1] == 1 else folder_of(out, part)
    # A part of an array becomes complete by its new name; a whole set by its index.
    folder = out if part[1] == 1 else done.with_name(f"{done.name}.partial")
    files = [open_file(path, access) for path in jsonl]
    total = sum(map(len, files))
    samples = total * (part[0] + 1) // part[1] - total * part[0] // part[1]
    count = num_parts(folder) or _parts(samples, workers)
    workers = workers or num_cores()
    write = partial(convert, jsonl, shard_bytes=shard_bytes, access=access, skip_broken=skip_broken)
    if count == 1:
        return write(out, part=part, progress=progress, tell=tell)
    stop = multiprocessing.get_context("fork").Event()

    def one(number: int) -> None:
        if stop.is_set():  # the error of another part comes in its turn
            return
        try:
            write(folder, part=(number, count), within=part, index=False)
        except BaseException:
            stop.set()
            raise

    made = made_from(files, part[1], shard_bytes, skip_broken)
    if part[1] > 1:
        check_siblings(out, made)
    with lock_of(done) as lock:
        lock.take()
        if part[1] > 1 and done.exists():
            return done
        if not num_parts(folder):
            if part[1] > 1 and folder.exists():
                shutil.rmtree(folder)  # left by one process that was killed: it has no complete part
            if not has_only_locks(folder):  # which an attempt leaves of which no part became complete
                check_new(folder)
        with progress("writing", count, "parts") as bar:
            for _ in in_processes(one, count, workers, "writing shards"):
                bar.advance()
        if not any(folder.rglob("*.tar")):
            names = ", ".join(file.path for file in files)
            for written in (path for path in folder.glob("part-*") if path.is_dir()):
                shutil.rmtree(written)
            if has_only_locks(folder):
                shutil.rmtree(folder)
            raise UserError(f"no sample of {names} can be read", "run without --skip-broken to see why")
        prepare(folder, force=True, progress=progress)
        unusable = unusable_of_parts(folder, count)
        if part[1] > 1:
            write_text(folder / PART, json.dumps(made))
            folder.rename(done)
    tell(unusable)
    return done


def _parts(samples: int, workers: int | None) -> int:
    """The number of parts of a new folder."""
    if workers is None and samples < SMALL:
        return 1
    processes = workers or num_cores()
    if processes == 1:
        return 1
    return max(1, min(samples, max(processes, min(_PARTS * processes, samples // SMALL))))
