"""Blocks of host memory: what is too large, and what a forked process has of them."""

import os
from pathlib import Path

import pytest
import torch

from megavlm.base.errors import UserError
from megavlm.platform.host_memory import HostMemory


def test_pieces():
    memory = HostMemory([12, 100])
    one, two = memory.take(3, torch.float32), memory.take(50, torch.bfloat16)
    one.fill_(1), two.fill_(2)
    assert (one.sum(), two.sum()) == (3, 100)
    assert two.data_ptr() - one.data_ptr() == 64
    assert HostMemory([]).take(0, torch.float32).numel() == 0


def test_too_much():
    with pytest.raises(UserError, match=r"1\.07e\+09 GiB of page-locked host memory could not be had on .*: ") as found:
        HostMemory([2**60])
    assert "train.offload_activations=false" in str(found.value)


def mapped(place: int) -> bool:
    """Whether this process has memory there."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(begin <= place < end for begin, end in ranges)


def test_a_forked_process_has_none_of_it():
    """Its pages, which are locked, would be copied at the fork."""
    block = HostMemory([1 << 20]).take(1 << 18, torch.float32)
    assert mapped(block.data_ptr())
    child = os.fork()
    if child == 0:
        os._exit(mapped(block.data_ptr()))
    assert os.waitpid(child, 0)[1] == 0
