"""The device of this process: memory that is counted, copies, points in time, and the variable that forces the CPU."""

import os

import torch

from megavlm import platform
from megavlm.platform.device import repeat_results


def test_the_cpu_can_be_forced(monkeypatch):
    monkeypatch.setenv("MEGAVLM_PLATFORM", "cpu")
    assert not platform.on_gpu()
    assert (platform.device().type, platform.backend(), platform.device_name()) == ("cpu", "gloo", None)


def test_copies_and_marks_on_the_cpu(monkeypatch):
    monkeypatch.setenv("MEGAVLM_PLATFORM", "cpu")
    start = platform.mark()
    buffer = platform.host_buffer(3, 2, torch.bfloat16).fill_(1.5)
    copy = platform.to_device(buffer, platform.device())
    assert (copy.dtype, copy.shape, copy.sum().item()) == (torch.bfloat16, (3, 2), 9.0)
    assert 0 <= platform.seconds_between(start, platform.mark()) < 60
    before = platform.memory_gib()
    held = torch.ones(2**28 // 4)  # a quarter of a GiB
    assert platform.memory_gib() >= before > 0
    assert held.sum() == 2**26


def test_results_are_made_to_repeat(monkeypatch):
    """For torch, and for Transformer Engine and NCCL, which read the environment; a user's own choice stays."""
    for name in ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    try:
        repeat_results()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_ALGO"] == "Ring"
    finally:
        torch.use_deterministic_algorithms(False)
