"""The process in which megatron-energon indexes shards.

The process isolates megavlm from energon's output, its ``sys.exit``, and the processes that it forks and does not end
when it fails. This module has few imports, so that the process starts quickly.
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
from typing import Any

from megavlm.base import processes

_MAX_WORKERS = 32
_NO_SAMPLES = re.compile(r"Shard (.+) has no samples")  # energon's message, also for a shard that it cannot read


def index(folder: str, shards: list[str], sender: Connection, parent: int) -> None:
    """Indexes `shards` of `folder` and ends the process.

    It sends "shard" after each shard. At the end it sends None, or an error: ``{"shard": name}`` if a shard has no
    samples or cannot be read, ``{"key": key}`` if two samples have this key, or ``{"trace": text}`` for other errors.

    Args:
        folder: the folder of the shards.
        shards: paths relative to `folder`.
        sender: the connection to the parent process.
        parent: id of the parent process; if it dies, this process and its workers end, too.
    """
    processes.end_with_parent(parent)
    multiprocessing.set_start_method("fork", force=True)  # energon's workers and queues require it
    forking = os.getpid()

    def before_fork() -> None:
        nonlocal forking
        forking = os.getpid()

    # a worker that is forked while its parent dies would miss the signal: it compares the parent's id
    os.register_at_fork(before=before_fork, after_in_child=lambda: processes.end_with_parent(forking))
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
    except SystemExit as error:  # energon exits after it has printed an error about duplicate keys
        duplicate: Any = error.__context__  # energon's exception, which has no importable type
        sender.send({"key": duplicate.sample_key})
    except Exception as error:
        unread = _NO_SAMPLES.match(str(error)) if isinstance(error, AssertionError) else None
        sender.send({"shard": unread[1]} if unread else {"trace": traceback.format_exc()})
    # A normal exit would wait until a queue is empty, but nothing reads this queue after a failure.
    os._exit(0)
