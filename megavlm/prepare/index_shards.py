"""Builds megatron-energon's index of WebDataset shards: ``.nv-meta`` in their folder, and ``*.tar.idx`` next to each.

Energon runs in a separate process (`megavlm.prepare.energon_process`).
"""

import contextlib
import multiprocessing
import os
import signal
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.prepare import energon_process
from megavlm.sources.shards import INDEX, INFO

_BLOCK = 512  # block size of a tar file in bytes; a block of zeros marks the end of the archive


def find_shards(folder: Path) -> list[str]:
    """The sorted ``*.tar`` files in and below a folder, relative to it. Raises UserError if there are none."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}", "give a folder of WebDataset shards, or use --jsonl FILE --out DIR")
    shards = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path.is_file())
    if not shards:
        packed = next((path.name for end in ("gz", "zst", "xz", "bz2") for path in folder.rglob(f"*.tar.{end}")), None)
        raise UserError(
            f"{folder} has no *.tar files"
            + (f", only {packed}: single samples cannot be read from a compressed tar file" * bool(packed)),
            "decompress it" if packed else "give a folder of WebDataset shards, or use --jsonl FILE --out DIR",
        )
    return shards


def is_up_to_date(folder: Path, shards: Sequence[str]) -> bool:
    """Whether the index covers these shards in this order, and no shard has changed since it was built."""
    try:
        counts = parse_json((folder / INFO).read_text())["shard_counts"]
        return list(counts) == list(shards) and all(
            (index := os.stat(f"{folder / shard}{INDEX}")).st_mtime_ns >= os.stat(folder / shard).st_mtime_ns
            # an interrupted run may have updated only one of the two index files
            and index.st_size == 8 * (counts[shard] + 1)
            for shard in shards
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_writable(folder: Path) -> None:
    """Raises UserError if an index cannot be written into a folder."""
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} is not writable, but the index is stored next to the shards",
            "copy the shards to another folder, or get write permission",
        )


def index_shards(folder: Path, shards: Sequence[str], done: Callable[[], None]) -> None:
    """Indexes `shards` (paths relative to `folder`) with energon and calls `done` after each shard.

    Raises:
        UserError: a shard is damaged or empty, or two samples have the same key; the message names it. The folder then
            has no index.
    """
    (folder / INFO).unlink(missing_ok=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=energon_process.index, args=(str(folder), list(shards), sender, os.getpid()), name="index of shards"
    )
    with _no_interrupt():
        process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            if message == "shard":
                done()
            else:
                raise _explained(folder, **message)
    except EOFError:
        process.join()
        raise RuntimeError(f"the indexing of {folder} ended with status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    damaged = [shard for shard in shards if not _is_ended(f"{folder / shard}")]
    if damaged:
        (folder / INFO).unlink()
        raise UserError(
            f"in {folder}, {', '.join(damaged[:5])}"
            + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
            + ": the archive does not end after the last sample found: the file is truncated, damaged or compressed",
            "download or write it again",
        )


def _explained(folder: Path, *, key: str = "", shard: str = "", trace: str = "") -> Exception:
    if key:
        return UserError(
            f"two samples in {folder} have the same key {key!r} (not adjacent in a shard, or in different shards)",
            "make keys unique in the folder; `energon prepare --fix-duplicates` prefixes them with the shard's name",
        )
    if trace:
        return RuntimeError(f"{folder} could not be indexed:\n{trace}")
    cause = "it contains no samples: members must be named KEY.json or KEY.txt, and KEY.jpg, KEY.0.jpg, KEY.mp4, …"
    try:
        with tarfile.open(folder / shard, "r:") as tar:
            for _ in tar:
                pass
    except (OSError, EOFError, tarfile.TarError) as error:
        cause = f"it is damaged or not a tar file: {error}"
    return UserError(
        f"shard {folder / shard} cannot be used: {cause}", "download or write it again, or move it out of the folder"
    )


def _is_ended(shard: str) -> bool:
    """Whether the last position in the index is the end of the archive.

    tarfile treats an invalid header like the end of the archive, so all samples after it would be lost silently.
    """
    with open(shard + INDEX, "rb") as index, open(shard, "rb") as tar:
        index.seek(-8, os.SEEK_END)
        tar.seek(struct.unpack("<Q", index.read(8))[0])
        return tar.read(_BLOCK) == bytes(_BLOCK)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that are started within this context ignore Ctrl-C, because the process that starts them ends them."""
    before: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
