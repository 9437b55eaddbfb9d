"""Work that is spread over forked processes."""

import multiprocessing
import os
import signal

import pytest

from megavlm.base.errors import UserError
from megavlm.base.pools import Forked, in_processes


def test_processes_stay_until_the_block_ends() -> None:
    learnt: list[int] = []
    both = multiprocessing.get_context("fork").Barrier(2)

    def work(number: int) -> tuple[int, list[int]]:
        both.wait(60)  # so that neither does all of it
        learnt.append(number)
        return os.getpid(), list(learnt)

    with Forked(work, 2, "counting") as processes:
        first, second = (dict(processes.map([place, place + 1])) for place in (0, 2))
    assert os.getpid() not in first
    assert len(first) == 2
    assert {process: known[:1] for process, known in second.items()} == first
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
