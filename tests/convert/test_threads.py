"""The thread pool of the conversions: order, parallel calls, the end after an error, torch's own threads."""

import threading

import pytest
import torch

from megavlm.convert.threads import THREADS, in_threads


def test_results_in_order_and_several_at_once():
    together = threading.Barrier(THREADS, timeout=30)  # breaks, with an exception, if fewer run at a time

    def double(x):
        together.wait()
        return 2 * x, torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert in_threads(double, range(2 * THREADS)) == [(2 * x, 1) for x in range(2 * THREADS)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_ends_the_rest():
    begun, failed = [], threading.Event()

    def work(x):
        begun.append(x)
        if x == 0:
            failed.set()
            raise ValueError("the first")
        failed.wait(30)

    with pytest.raises(ValueError, match="the first"):
        in_threads(work, range(1000))
    assert len(begun) < 1000
