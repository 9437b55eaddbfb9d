"""The index of WebDataset shards, made by megatron-energon: ``.nv-meta`` in their folder, ``*.tar.idx`` beside each.

Energon works in a process of its own (`megavlm.prepare.energon_process`).
"""

import contextlib
import json
import multiprocessing
import os
import signal
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.data.shards import INDEX, INFO
from megavlm.prepare import energon_process

_BLOCK = 512  # bytes of a tar file's header, and of the zeros that end it


def find_shards(folder: Path) -> list[str]:
    """The ``*.tar`` of a folder and those below it, relative to it, by name. Raises UserError if there are none."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}", "name a folder of WebDataset shards, or give --jsonl FILE --out DIR")
    shards = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path.is_file())
    if not shards:
        packed = next((path.name for end in ("gz", "zst", "xz", "bz2") for path in folder.rglob(f"*.tar.{end}")), None)
        raise UserError(
            f"{folder} has no *.tar files"
            + (f", but {packed}: a compressed tar cannot be read by sample" * bool(packed)),
            "unpack it" if packed else "name a folder of WebDataset shards, or give --jsonl FILE --out DIR",
        )
    return shards


def is_up_to_date(folder: Path, shards: Sequence[str]) -> bool:
    """Whether the index is of these shards, in this order, and none has changed since."""
    try:
        counts = json.loads((folder / INFO).read_text())["shard_counts"]
        return list(counts) == list(shards) and all(
            (index := os.stat(f"{folder / shard}{INDEX}")).st_mtime_ns >= os.stat(folder / shard).st_mtime_ns
            # an interrupted indexing may have renewed the one without the other
            and index.st_size == 8 * (counts[shard] + 1)
            for shard in shards
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def index_shards(folder: Path, shards: Sequence[str], done: Callable[[], None]) -> None:
    """Has energon index `shards` (paths relative to `folder`) and calls `done` after each.

    Raises:
        UserError: names the shard that is damaged or empty, or the key that two samples have. The folder then counts
            as not prepared.
    """
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to: the index lies beside the shards", "copy them, or get the right"
        )
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
            f"no end of the archive behind the last sample that was found in {', '.join(damaged[:5])}"
            + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
            + f", in {folder}: the file was cut off, is damaged or compressed",
            "fetch or write it again",
        )


def _explained(folder: Path, *, key: str = "", shard: str = "", trace: str = "") -> Exception:
    if key:
        return UserError(
            f"two samples of {folder} have the key {key!r}, in one shard with others between them or in two shards",
            "keys must be unique in the folder; `energon prepare --fix-duplicates` puts the shard's name before them",
        )
    if trace:
        return RuntimeError(f"{folder} could not be indexed:\n{trace}")
    cause = "it holds no sample: members are called KEY.json or KEY.txt, and KEY.jpg, KEY.0.jpg, KEY.mp4, …"
    try:
        with tarfile.open(folder / shard, "r:") as tar:
            for _ in tar:
                pass
    except (OSError, EOFError, tarfile.TarError) as error:
        cause = f"it is damaged or no tar file: {error}"
    return UserError(f"shard {folder / shard} cannot be used: {cause}", "fetch or write it again, or move it away")


def _is_ended(shard: str) -> bool:
    """Whether the place where the index ends is the end of the archive.

    tarfile stops at a header that makes no sense as it does at the end; all samples behind it would be lost unseen.
    """
    with open(shard + INDEX, "rb") as index, open(shard, "rb") as tar:
        index.seek(-8, os.SEEK_END)
        tar.seek(struct.unpack("<Q", index.read(8))[0])
        return tar.read(_BLOCK) == bytes(_BLOCK)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C: who started them ends them."""
    before: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
