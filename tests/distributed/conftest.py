"""Worlds of 1, 2, 4 and 8 gloo processes for the tests in this folder, see pool.py, and fixtures of other files."""

import gc

import pytest
from parity import Toys
from pool import Pool
from toy import write_records
from vllm_served import asked, prompts, python, sampling, served, served_moe  # noqa: F401 (fixtures)


def forget_megatron() -> None:
    """Leaves nothing of a call's layout to the next one in the same process."""
    from megatron.core import num_microbatches_calculator
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    from megavlm.platform.groups import shutdown

    shutdown()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    # A dispatcher keeps its last routing, whose graph leads back to the model by ways that the garbage collector cannot
    # see: model and process groups would stay, and hundreds of gloo's threads with them.
    for dispatcher in (thing for thing in gc.get_objects() if isinstance(thing, MoETokenDispatcher)):
        vars(dispatcher).clear()
    gc.collect()


@pytest.fixture(scope="session")
def world1():
    yield from _world(1)


@pytest.fixture(scope="session")
def world2():
    yield from _world(2)


@pytest.fixture(scope="session")
def world4():
    yield from _world(4)


@pytest.fixture(scope="session")
def world8():
    yield from _world(8)


@pytest.fixture(scope="session")
def te_world():
    """``te_world(n)``: a world of n processes that have Transformer Engine on a CPU (tests/te_cpu)."""
    from te_cpu import packages

    server, pools = packages.server(), {}

    def world(size: int) -> Pool:
        return pools.setdefault(size, Pool(size, 120.0, forget_megatron, server))

    yield world
    for pool in pools.values():
        pool.close()


def _world(size: int):
    pool = Pool(size, after_each=forget_megatron)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def held_out(toys, request) -> list[dict]:
    """Sources of data.eval: a file for each of the module's PARTS, a name and which of the toy's records it has."""
    parts = request.module.PARTS.items()
    return [{"path": str(write_records(toys.root / f"{name}.jsonl", toys.records[part]))} for name, part in parts]
