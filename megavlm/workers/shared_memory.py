"""Rows on their way from a data worker to the trainer: in shared memory, of which a container may have very little."""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from megavlm.base.errors import RunFailure, UserError

_FOLDER = "/dev/shm"
# What torch says in a worker that cannot allocate shared memory.
_REFUSED = re.compile(r"shared memory|/torch_\d+|unable to (resize|stretch) file")


def sent[T](rows: Iterator[T]) -> Iterator[T | UserError]:
    """Yields rows in a data worker (or the trainer). If no further row can be made, the last item is the error.

    The error is yielded because an exception raised in a worker process arrives only as the text of a traceback.
    """
    in_worker = torch.utils.data.get_worker_info() is not None
    try:
        for row in rows:
            yield _shared(row) if in_worker else row
    except UserError as error:
        yield error
    except (RuntimeError, OSError) as error:
        if not _REFUSED.search(str(error)):
            raise
        yield too_little(str(error))


def _shared(row: Any) -> Any:
    """The row, or list of samples, with all its tensors in shared memory. Raises RuntimeError if there is too little.

    torch would otherwise do this in a thread of the worker that only prints its errors; the trainer would wait for
    ever.
    """
    for part in row if isinstance(row, list) else [row]:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                value.share_memory_()
    return row


def too_little(cause: str) -> RunFailure:
    """The failure of a worker that got no shared memory for a row; `cause` is what happened to it."""
    space = ""
    if os.path.isdir(_FOLDER):
        usage = shutil.disk_usage(_FOLDER)
        space = f": {_FOLDER} has {usage.total / 2**20:,.0f} MiB, {usage.free / 2**20:,.0f} of them free"
    return RunFailure(
        f"a data worker could not get shared memory for a row{space} ({cause})",
        "give the container more (docker run --shm-size=16g, or --ipc=host), lower data.workers or data.max_pixels, or "
        "set data.workers to 0",
    )
