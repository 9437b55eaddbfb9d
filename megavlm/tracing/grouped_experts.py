"""The operators of experts as kernels for a GPU carry them out: one for all experts of a rank.

The portable kernels run one expert after the other. On the meta device all of them get the same number of tokens, so
their operators are alike, and one grouped operator stands for as many as there are experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megavlm.model.vlm import VLM
from megavlm.tracing.operators import EXPERTS, Call, Operators, Place


@dataclass
class Experts:
    """Tells ``operators`` when experts run, in the forward and in the backward pass.

    Attributes:
        operators: what records.
        traced: the number of experts on the rank that is traced.
        whole: the number of experts on a rank of the run, of which each of those stands for several.
        shapes: those of an expert's matrices, the smaller side first.
    """

    operators: Operators
    traced: int = 1
    whole: int = 1
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    _outside: str = "decoder"

    def watch(self, vlm: VLM, whole: int) -> None:
        """Watches the experts of a model. ``whole``: see above."""
        for module in (module for chunk in vlm.language for module in chunk.modules()):
            if isinstance(module, SequentialMLP):
                self.traced, self.whole = module.num_local_experts, whole
                for weight in module.parameters():
                    self.shapes.add(tuple(sorted(weight.shape)))
                    stored = weight, getattr(weight, "main_grad", weight)
                    self.operators.weights |= {tensor.untyped_storage()._cdata for tensor in stored}
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def _before(self, module: torch.nn.Module, args: tuple) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: self._end())
        self._begin()

    def _after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._end()
        if output[0].requires_grad and args[0].requires_grad:
            output[0].register_hook(lambda gradient: self._begin())

    def _begin(self) -> None:
        self._outside, self.operators.phase = self.operators.phase, EXPERTS

    def _end(self) -> None:
        if self.operators.phase == EXPERTS:
            self.operators.phase = self._outside

    def grouped(self, found: Mapping[tuple[Place, Call], int]) -> dict[tuple[Place, Call], float]:
        """The operators, those of experts grouped, in the phase in which the experts run."""
        total: dict[tuple[Place, Call], float] = {}
        for (place, call), times in found.items():
            count, own = float(times), call
            if place.phase == EXPERTS:
                place = place._replace(phase=self._outside)
                if call.kind != "collective":
                    count, own = times / self.traced, self._one(call)
            total[place, own] = total.get((place, own), 0.0) + count
        return total

    def _one(self, call: Call) -> Call:
        """One operator of all experts. What each expert reads of its weights, all experts of the run read."""
        flops = call.flops * self.traced
        if call.kind == "product":
            batch, *sides = call.sizes
            read = max((math.prod(pair) for pair in combinations(sorted(sides), 2) if pair in self.shapes), default=0)
            moved = call.moved * self.traced + read * _itemsize(call) * (self.whole - self.traced)
            return call._replace(sizes=(batch * self.traced, *sides), flops=flops, moved=moved)
        experts = self.whole if call.sizes == (1,) else self.traced
        return call._replace(sizes=(), flops=flops, moved=call.moved * experts)


def _itemsize(call: Call) -> int:
    return int(getattr(torch, call.dtype).itemsize)
