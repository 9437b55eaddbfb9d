"""Measures operators on this machine: each is carried out with tensors of the sizes that a step has.

On several processes, all of them measure at the same time, because they share memory and caches in a step, too.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.platform import attention_blocks, synchronize
from megavlm.tracing.operators import Call, Example, TensorOf

_SECONDS = 0.02  # of each operator, at least
_CALLS = 3  # at least
_BYTES = 64 * 2**20  # arguments are taken in turn from copies of this size together, so that no cache has them

Measurement = tuple[Call, float]
"""An operator, and the seconds of one call."""


def measure_operators(examples: Mapping[Call, Example], where: torch.device) -> list[Measurement]:
    """Measures operators on a device. Those that cannot be carried out apart from a step are left out.

    Args:
        examples: from ``stage_operators``.
        where: the device.
    """
    torch.set_flush_denormal(True)  # operators that work in place are repeated until their values vanish
    try:
        with torch.no_grad():
            found = [(call, _seconds(call, example, where)) for call, example in examples.items()]
    finally:
        torch.set_flush_denormal(False)
    return [(call, seconds) for call, seconds in found if seconds is not None]


def _seconds(call: Call, example: Example, where: torch.device) -> float | None:
    copies = max(1, min(8, _BYTES // max(call.moved, 1)))
    func = _attention(call) if call.kind == "attention" else example.func
    turn = 0

    def run() -> None:
        nonlocal turn
        args, kwargs = ready[turn % copies]
        func(*args, **kwargs)
        turn += 1

    try:
        ready = [_arguments(example, where) for _ in range(copies)]
        run()
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None  # it needs values, such as indices, that its shapes do not tell; it costs what is assumed
    return timed(run)


def _attention(call: Call) -> Callable[..., Any]:
    """Attention as this device computes it, with the arguments of the kernel for CPUs, which was recorded."""
    if not call.name.endswith("backward"):
        return lambda query, key, value, dropout=0.0, causal=False, scale=None, **_: attention_blocks.forward(
            query, key, value, causal=causal, scale=scale
        )
    return lambda grad, query, key, value, out, log_sum, dropout, causal, scale=None, **_: attention_blocks.backward(
        grad, query, key, value, out, log_sum, causal=causal, scale=scale
    )


def timed(run: Callable[[], object]) -> float:
    """Mean seconds of a call of ``run``."""
    synchronize()
    calls, start = 0, time.perf_counter()
    while calls < _CALLS or time.perf_counter() - start < _SECONDS:
        run()
        calls += 1
    synchronize()
    return (time.perf_counter() - start) / calls


def _arguments(example: Example, where: torch.device) -> tuple[list, dict[str, Any]]:
    first = next((one for one in example.args if isinstance(one, TensorOf)), None)
    numbers = [one for one in example.args if isinstance(one, int) and not isinstance(one, bool)]
    bound = 1
    if "embedding_dense_backward" in str(example.func):
        bound = numbers[0]
    elif first is not None and first.shape:
        bound = first.shape[numbers[0] if numbers and numbers[0] < len(first.shape) else 0]

    def made(value: Any) -> Any:
        if isinstance(value, TensorOf):
            return _tensor(value, max(bound, 1), where)
        if isinstance(value, list):
            return [made(one) for one in value]
        return where if isinstance(value, torch.device) else value

    return [made(one) for one in example.args], {name: made(one) for name, one in example.kwargs.items()}


def _tensor(of: TensorOf, bound: int, where: torch.device) -> Tensor:
    """A tensor with these strides: halves, or indices below ``bound``."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(of.shape, of.stride, strict=True))
    if 0 in of.shape:
        return torch.empty(of.shape, dtype=of.dtype, device=where)
    if of.dtype.is_floating_point:
        base = torch.full((size,), 0.5, dtype=of.dtype, device=where)
    else:
        base = (torch.arange(size, device=where) % (2 if of.dtype == torch.bool else bound)).to(of.dtype)
    return base.as_strided(of.shape, of.stride)


def measure_collectives(group: dist.ProcessGroup, where: torch.device, largest: int = 64 * 2**20) -> list[Measurement]:
    """Measures collectives over a group, from 1 KiB to ``largest`` bytes that a rank hands over.

    Call it on all ranks of the group.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    found: list[Measurement] = []
    size = 1024
    while size <= largest:
        work = _collectives(group, where, size // 4)
        for name, run in work.items():
            dist.barrier(group=group)
            for _ in range(2):
                run()
            repeats = 10 if size < 2**22 else 3  # the same on all ranks
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            synchronize()
            seconds = (time.perf_counter() - start) / repeats
            found.append((Call("collective", name, ranks, "float32", 0, size), seconds))
        size *= 4
    return found


def _collectives(group: dist.ProcessGroup, where: torch.device, numbers: int) -> dict[str, Callable[[], object]]:
    """Collectives to which each rank hands so many numbers."""
    n = group.size()
    mine, other = (torch.zeros(numbers, device=where) for _ in range(2))
    whole, part = torch.zeros(numbers * n, device=where), torch.zeros(numbers // n, device=where)
    return {
        "all_reduce": lambda: dist.all_reduce(mine, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, mine, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, mine[: numbers // n * n], group=group),
        "all_to_all": lambda: dist.all_to_all_single(other[: numbers // n * n], mine[: numbers // n * n], group=group),
        "send": lambda: _pass_on(mine, other, group),
    }


def _pass_on(mine: Tensor, other: Tensor, group: dist.ProcessGroup) -> None:
    """Sends to the next rank and receives from the one before."""
    rank, n = group.rank(), group.size()
    to, source = (dist.get_global_rank(group, (rank + step) % n) for step in (1, -1))
    sending = dist.isend(mine, to, group=group)
    dist.recv(other, source, group=group)
    assert sending is not None
    sending.wait()
