"""Seconds of an operator on a GPU: by shares of its peaks that are assumed, or by measurements on a machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megavlm.plan.gpus import Gpu
from megavlm.plan.operators import Call

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


@dataclass(frozen=True)
class Point:
    """A measurement: the sizes, bytes and operations of a call, and its seconds."""

    sizes: tuple[int, ...]
    flops: float
    moved: float
    seconds: float


class Measured:
    """Costs by measurements: the time of the nearest measured size, scaled by operations or bytes.

    Args:
        points: measurements by kind, name and dtype of the operator; for a collective, also the number of ranks.
        overhead: seconds that the process needs for each call in a step beyond its work.
        further: tells what was not measured.
    """

    def __init__(self, points: dict[tuple, list[Point]], overhead: float, further: Costs):
        self._points, self._overhead, self._further = points, overhead, further
        self._known: dict[Call, float] = {}

    def seconds(self, call: Call, *, fp8: bool = False) -> float:
        if call not in self._known:
            points = self._points.get(key_of(call))
            self._known[call] = self._of(call, points) if points else self._further.seconds(call)
        return self._known[call]

    def _of(self, call: Call, points: Sequence[Point]) -> float:
        if call.kind in ("product", "attention"):
            near = min(points, key=lambda point: _distance(point.sizes, call.sizes))
            return near.seconds * call.flops / near.flops + self._overhead
        near = min(points, key=lambda point: abs(math.log((1 + point.moved) / (1 + call.moved))))
        larger = call.moved > near.moved  # below the smallest size, a call takes as long as that
        ratio = call.moved / near.moved if larger or (len(points) > 1 and near is not _smallest(points)) else 1.0
        return near.seconds * ratio + self._overhead


def _smallest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.moved)


def _distance(sizes: tuple[int, ...], others: tuple[int, ...]) -> float:
    return sum(math.log((1 + a) / (1 + b)) ** 2 for a, b in zip(sizes, others, strict=True))


def key_of(call: Call) -> tuple:
    """What measurements of a call can be used for."""
    return (call.kind, call.name, call.dtype, *([len(call.sizes)] if call.kind == "collective" else []))
