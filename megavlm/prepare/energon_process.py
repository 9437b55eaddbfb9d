"""A process in which megatron-energon indexes shards.

What it prints, its ``sys.exit``, the processes that it forks and leaves behind when it fails: all of that ends here.
The module imports little, so that the process starts quickly.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import re
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from megavlm.base import processes

_MAX_WORKERS = 32
_NO_SAMPLES = re.compile(r"Shard (.+) has no samples")  # how energon tells of a shard that it could not read, too


def index(folder: str, shards: list[str], sender: Connection, parent: int) -> None:
    """Indexes `shards` of `folder`. Ends the process.

    Sends "shard" after each, and at the end None, or what went wrong: ``{"shard": name}`` of one that has no samples or
    cannot be read, ``{"key": key}`` that two samples have, ``{"trace": text}`` of anything else.

    Args:
        parent: process id of the process that started this one; when it dies, so does this one with its workers.
    """
    processes.end_with_parent(parent)
    multiprocessing.set_start_method("fork", force=True)  # that of energon's workers, for their queues
    os.register_at_fork(after_in_child=processes.end_with_parent)
    try:
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

        logging.getLogger("megatron.energon").setLevel(logging.CRITICAL)

        def progress(items: Iterator[int], total: int) -> Iterator[int]:
            for item in items:
                sender.send("shard")
                yield item

        with contextlib.redirect_stdout(io.StringIO()):
            WebdatasetPreparator.prepare_dataset(
                Path(folder),
                shards,
                split_parts_ratio=[("train", 1.0)],
                shuffle_seed=None,
                progress_fn=progress,
                workers=min(len(os.sched_getaffinity(0)), len(shards), _MAX_WORKERS),
            )
        sender.send(None)
    except SystemExit as error:  # told as readably as energon can
        sender.send({"key": error.__context__.sample_key})
    except Exception as error:
        unread = _NO_SAMPLES.match(str(error)) if isinstance(error, AssertionError) else None
        sender.send({"shard": unread[1]} if unread else {"trace": traceback.format_exc()})
    # Not by the way of an orderly exit: it waits until a queue is empty that nobody reads after a failure.
    os._exit(0)
