"""Python objects between ranks: what comes back, and that an exception on one rank reaches all of them."""

import pytest
import torch.distributed as dist


def exchange():
    from megavlm.platform.collectives import (
        all_gather_objects,
        broadcast_object,
        gather_objects,
        on_first_rank,
        scatter_objects,
    )

    rank, group = dist.get_rank(), dist.group.WORLD
    called = []

    def work():
        called.append(rank)
        return {"answer": 42}

    return (
        broadcast_object(f"from {rank}", group),
        all_gather_objects(rank, group),
        gather_objects(rank, group),
        scatter_objects(["a", "b"] if rank == 0 else None, group),
        on_first_rank(work, group),
        called,
    )


def test_objects_arrive(world2):
    first, second = world2.run(exchange)
    assert first == ("from 0", [0, 1], [0, 1], "a", {"answer": 42}, [0])
    assert second == ("from 0", [0, 1], [], "b", {"answer": 42}, [])


class Unpicklable(Exception):
    def __init__(self, message: str, code: int):  # pickle calls it with the message alone
        super().__init__(message)


def fail(picklable: bool):
    from megavlm.base.errors import UserError
    from megavlm.platform.collectives import on_first_rank

    def work():
        raise UserError("the disk is full", "make room") if picklable else Unpicklable("no such thing", 3)

    try:
        on_first_rank(work, dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(("picklable", "on_others"), [(True, "UserError"), (False, "RuntimeError")])
def test_an_exception_on_the_first_rank_is_raised_on_all(picklable, on_others, world2):
    (first, message), (second, elsewhere) = world2.run(fail, picklable)
    assert first == ("UserError" if picklable else "Unpicklable")
    assert second == on_others
    assert message in elsewhere
