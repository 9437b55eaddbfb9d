"""Seconds of an operator on a GPU: by shares of its peaks that are assumed, or by measurements on a machine."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megavlm.plan.gpus import Gpu
from megavlm.tracing.operators import Call

_FLOAT32 = 1 / 16  # of the bf16 peak: float32 products without tensor cores, on A100 and H100


class Costs(Protocol):
    """Tells the seconds of operators."""

    def seconds(self, call: Call, *, fp8: bool = False) -> float:
        """Of one call. ``fp8``: products of half precision are carried out in FP8."""
        ...


@dataclass(frozen=True)
class Assumed:
    """Costs by shares of a GPU's peaks, from the entry ``operators`` of ``gpus.yaml``."""

    gpu: Gpu

    def seconds(self, call: Call, *, fp8: bool = False) -> float:
        shares, gpu = self.gpu.operators, self.gpu
        if call.kind == "collective":
            return collective_seconds(call, gpu)
        if call.kind == "host":
            return call.moved / (gpu.pcie / 2 * 1e9 * shares["host"])
        at_memory = call.moved / (gpu.memory_bandwidth * 1e9 * shares["memory"])
        if call.kind == "elementwise":
            return shares["unfused"] * (at_memory + shares["overhead"])
        peak = gpu.bf16_tflops * 1e12
        if call.kind == "product":
            name = "product"
            if fp8 and call.dtype in ("bfloat16", "float16") and gpu.fp8_tflops is not None:
                peak, name = gpu.fp8_tflops * 1e12, "fp8_product"
        else:
            name = "attention_backward" if call.name.endswith("backward") else "attention"
        if call.dtype == "float32":
            peak *= _FLOAT32
        return max(call.flops / (peak * shares[name]), at_memory) + shares["overhead"]


def collective_seconds(call: Call, gpu: Gpu) -> float:
    """Latency, and bytes over the slowest link: NVLink within a domain, the network between domains.

    In a ring over several domains, the data crosses between two of them on as many network cards as the group has GPUs
    in each. In an all-to-all, what goes to other domains takes a GPU's own card while the rest takes NVLink.
    """
    ranks, shares = call.sizes, gpu.operators
    domains = len({rank // gpu.nvlink_domain for rank in ranks})
    inside = gpu.nvlink / 2 * 1e9 * shares["nvlink"]
    outside = gpu.fabric * 1e9 * shares["fabric"]
    if domains == 1:
        return shares["latency"] + on_wire(call) / inside
    each = len(ranks) / domains
    if call.name == "all_to_all":
        n = len(ranks)
        slowest = max(call.moved * (n - each) / n / outside, call.moved * (each - 1) / n / inside)
    else:
        slowest = on_wire(call) / min(inside, outside * each)
    return shares["latency_between"] + slowest


def on_wire(call: Call) -> float:
    """Bytes that each rank sends in the ring algorithms of NCCL."""
    n = len(call.sizes)
    if call.name == "all_reduce":
        return 2 * (n - 1) / n * call.moved
    if call.name == "all_gather":
        return float((n - 1) * call.moved)
    if call.name in ("reduce_scatter", "all_to_all"):
        return (n - 1) / n * call.moved
    return float(call.moved)


class Measured:
    """Costs by measurements: the time of the nearest measured size, scaled by operations or bytes.

    Args:
        points: operators and their measured seconds.
        overhead: seconds that the process needs for each call in a step beyond its work.
        further: tells the costs of operators of which no size was measured.
    """

    def __init__(self, points: Iterable[tuple[Call, float]], overhead: float, further: Costs):
        self._points: dict[tuple, list[tuple[Call, float]]] = defaultdict(list)
        for call, seconds in points:
            self._points[_alike(call)].append((call, seconds))
        self._overhead, self._further = overhead, further
        self._known: dict[Call, float] = {}

    def seconds(self, call: Call, *, fp8: bool = False) -> float:
        if call not in self._known:
            points = self._points.get(_alike(call))
            self._known[call] = self._overhead + (_of(call, points) if points else self._further.seconds(call))
        return self._known[call]


def costs_of(gpu: Gpu) -> Costs:
    """The costs of a GPU's operators: measured ones if it has any, otherwise assumed ones."""
    points = gpu.operators.get("points")
    if points is None:
        return Assumed(gpu)
    calls = [
        (Call(kind, name, tuple(sizes), dtype, flops, moved), s) for kind, name, sizes, dtype, flops, moved, s in points
    ]
    return Measured(calls, gpu.operators["overhead"], Assumed(gpu))


def _of(call: Call, points: Sequence[tuple[Call, float]]) -> float:
    if call.kind in ("product", "attention"):
        near, seconds = min(points, key=lambda point: _distance(point[0].sizes, call.sizes))
        return seconds * call.flops / max(near.flops, 1)
    near, seconds = min(points, key=lambda point: abs(math.log((1 + point[0].moved) / (1 + call.moved))))
    smallest = min(point[0].moved for point in points)
    if call.moved < near.moved == smallest:
        return seconds  # below the smallest size, a call takes as long as that
    return seconds * call.moved / max(near.moved, 1)


def _distance(sizes: tuple[int, ...], others: tuple[int, ...]) -> float:
    return sum(math.log((1 + a) / (1 + b)) ** 2 for a, b in zip(sizes, others, strict=True))


def _alike(call: Call) -> tuple:
    """What calls have in common that can be told from each other's measurements."""
    if call.kind == "collective":
        return (call.name, len(call.sizes))
    causal = call.sizes[-1] if call.kind == "attention" else None
    return (call.kind, call.name, call.dtype, causal)
