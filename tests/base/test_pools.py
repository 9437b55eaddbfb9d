"""Work that is spread over forked processes."""

import os
import signal

import pytest

from megavlm.base.errors import UserError
from megavlm.base.pools import Forked, in_processes


def test_processes_stay_until_the_block_ends() -> None:
    learnt: list[int] = []

    def work(number: int) -> tuple[int, list[int]]:
        learnt.append(number)
        return os.getpid(), list(learnt)

    with Forked(work, 2, "counting") as processes:
        first, second = (dict(processes.map(range(20))) for _ in range(2))
    assert os.getpid() not in first
    assert set(second) <= set(first)
    assert all(known[: len(first[process])] == first[process] for process, known in second.items())
    assert not learnt, "only results come back"


def test_results_are_in_order_and_one_process_is_this_one() -> None:
    assert list(in_processes(lambda number: number**2, 50, 3, "squaring")) == [number**2 for number in range(50)]
    assert list(in_processes(lambda _: os.getpid(), 3, 1, "looking")) == [os.getpid()] * 3


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(UserError, match="died while dying") as told, Forked(_killed, 2, "dying", "stop") as processes:
        list(processes.map([1, 2, 3]))
    assert told.value.remedy == "stop"


def _killed(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
