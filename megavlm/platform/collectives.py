"""Python objects between ranks, over the host network: broadcast, gather, and work that one rank does for all."""

import pickle
from collections.abc import Callable

import torch.distributed as dist


def broadcast_object[T](value: T, group: dist.ProcessGroup) -> T:
    """The object of the group's first rank, on every rank of the group; what the others pass is ignored.

    Args:
        value: anything that can be pickled.
        group: a group whose backend takes tensors in host memory. Call this on all of its ranks.
    """
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def on_first_rank[T](work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Calls ``work`` on the group's first rank and returns its result on every rank of the group.

    Args:
        work: called once, on the first rank; its result must be picklable.
        group: as for ``broadcast_object``. Call this on all of its ranks.

    Raises:
        Exception: whatever ``work`` raised, on every rank of the group, so that none of them waits for the others.
    """
    results: list[T] = []  # one result; none on the other ranks, and none after an error
    error: Exception | None = None
    if group.rank() == 0:
        try:
            results = [work()]
        except Exception as raised:
            error = raised
    everywhere, problem = broadcast_object((results, error and _picklable(error)), group)
    if problem is not None:
        raise error or problem  # on the first rank the original one, with its traceback
    return everywhere[0]


def _picklable(error: Exception) -> Exception:
    """The exception, or one with the same text where it cannot be sent: the other ranks must not wait for ever."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def all_gather_objects[T](value: T, group: dist.ProcessGroup) -> list[T]:
    """The objects of all ranks of the group, in the order of their ranks, on every rank of the group."""
    values: list = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects[T](value: T, group: dist.ProcessGroup) -> list[T]:
    """The objects of all ranks of the group, in the order of their ranks, on its first rank; [] on the others."""
    values: list | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values or []
