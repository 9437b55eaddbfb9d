"""Sends Python objects between ranks over the host network, and runs work on one rank for all of them."""

import pickle
import threading
from collections.abc import Callable
from typing import cast

import torch.distributed as dist

_SECONDS_BETWEEN_SIGNS = 20.0  # far less than the time after which a collective gives up


def broadcast_object[T](value: T, group: dist.ProcessGroup) -> T:
    """Returns the object of the group's first rank on every rank of the group. Other ranks' values are ignored.

    Args:
        value: any object that can be pickled.
        group: a group whose backend accepts tensors in host memory. Call this on all of its ranks.
    """
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def on_first_rank[T](work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Calls ``work`` on the group's first rank and returns its result on every rank of the group.

    Args:
        work: a function that is called once, on the first rank. Its result must be picklable.
        group: as for ``broadcast_object``. Call this on all of its ranks.

    Raises:
        Exception: the exception that ``work`` raised, on every rank of the group, so that no rank waits for the others.
    """
    result: T | None = None
    error: Exception | None = None
    if group.rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    everywhere, problem = broadcast_object((result, error and picklable(error)), group)
    if problem is not None:
        raise error or problem  # on the first rank the original one, with its traceback
    return cast(T, everywhere)  # without an error the first rank has sent a result


def while_others_wait[T](work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """As ``on_first_rank``, for work that may take longer than a collective waits, such as that of a person."""
    if group.size() == 1:
        return work()
    if group.rank() > 0:
        while broadcast_object(True, group):
            pass
        return on_first_rank(work, group)
    done = threading.Event()

    def wait() -> None:
        while not done.wait(_SECONDS_BETWEEN_SIGNS):
            broadcast_object(True, group)

    def work_beside() -> T:
        signs = threading.Thread(target=wait, daemon=True)
        signs.start()
        try:
            return work()
        finally:
            done.set()
            signs.join()
            broadcast_object(False, group)

    return on_first_rank(work_beside, group)


def picklable(error: Exception) -> Exception:
    """The exception, or one with the same text if it cannot be pickled, so that other ranks do not wait forever."""
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


def scatter_objects[T](values: list[T] | None, group: dist.ProcessGroup) -> T:
    """The object of ``values`` with this rank's number in the group. The first rank gives one for each; others None."""
    box: list = [None]
    dist.scatter_object_list(box, values, group=group, group_src=0)
    return box[0]
