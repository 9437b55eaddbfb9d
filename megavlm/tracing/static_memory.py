"""The bytes that a rank holds all the time: weights, gradient buffers, and the state of its optimizers.

They are read off the tensors themselves: the same function counts a real rank and one on the meta device
(``megavlm.platform.absent_world``), whose storages have a size and no memory. Nothing is computed by a formula, so
Megatron's padding of buckets, the cutting of buffers over data-parallel ranks and what is shared are as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from megavlm.adapters.nf4 import Nf4
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim.galore import GaLore
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.stored_adam import StoredAdam
from megavlm.tracing.known_shapes import KnownShapes


@dataclass(frozen=True)
class StaticMemory:
    """Bytes on one rank.

    Attributes:
        weights: parameters and buffers as they are stored, weights in 4 bits with their scales, and the padding of
            Megatron's parameter buffers.
        gradients: Megatron's gradient buffers, with their padding.
        optimizer: float32 copies of the weights and what the optimizers remember (Adam's two moments, GaLore's
            projected ones and their projectors), of this rank's share. Counts of steps, one number for each tensor in
            torch's Adam and none in Transformer Engine's, are left out.
        others: what is counted elsewhere (``further_memory``).
        on_host: what the optimizers have in host memory instead (``train.offload_optimizer``).
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    others: int = 0
    on_host: int = 0

    @property
    def total(self) -> int:
        """The sum of what is on the device."""
        return self.weights + self.gradients + self.optimizer + self.others

    def __add__(self, other: "StaticMemory") -> "StaticMemory":
        return StaticMemory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class StaticCount:
    """Counts models one after the other; what several of them share is counted once."""

    def __init__(self) -> None:
        self._counted: set[int] = set()  # addresses of storages, which the models keep alive

    def __call__(self, vlm: VLM, optimizers: Optimizers | None) -> StaticMemory:
        """What a model and its optimizers hold that has not been counted yet.

        Args:
            vlm: the model.
            optimizers: its optimizers, whose state exists (see ``make_state``); None if it is not trained.
        """
        weights = self._new(t for part in PARTS for module in vlm.modules_of(part) for t in tensors_of(module))
        if optimizers is None:
            return StaticMemory(weights)
        ddps = [ddp for ddps in optimizers.ddp.values() for ddp in ddps]
        buffers = [buffer for ddp in ddps for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        gradients, state = self._new(b.grad_data for b in buffers), self._new(_state_of(optimizers))
        on_host = optimizers.train.offload_optimizer
        return StaticMemory(weights, gradients, optimizer=0 if on_host else state, on_host=state if on_host else 0)

    def _new(self, tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._counted:
                self._counted.add(storage._cdata)
                total += storage.nbytes()
        return total


def make_state(optimizers: Optimizers) -> None:
    """Lets optimizers on the meta device create the state that they otherwise create in their first step.

    Real optimizers do it by stepping, which would change weights: there, count after a step.
    """
    for optimizer in (part.optimizer for part in optimizers.optimizer.chained_optimizers if part.optimizer is not None):
        if isinstance(optimizer, GaLore | StoredAdam):
            optimizer.fill()
            continue
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        assert all(weight.is_meta for weight in weights)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        with KnownShapes():
            optimizer.step()
        for weight in weights:
            weight.grad = None


def tensors_of(module: nn.Module) -> Iterable[Tensor]:
    """Parameters, buffers, and what weights in 4 bits consist of."""
    yield from module.parameters()
    yield from module.buffers()
    for quantized in (getattr(one, "nf4", None) for one in module.modules()):
        if isinstance(quantized, Nf4):
            yield from quantized.tensors()


def _state_of(optimizers: Optimizers) -> Iterable[Tensor]:
    """The float32 copies, and all state but numbers of steps. What is a weight itself has been counted as one."""
    for optimizer in (part.optimizer for part in optimizers.optimizer.chained_optimizers if part.optimizer is not None):
        if isinstance(optimizer, StoredAdam):
            yield from optimizer.held()
            continue
        for weight in (w for group in optimizer.param_groups for w in group["params"]):
            yield weight
            state = optimizer.state.get(weight, {})
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())
