"""AdamW whose state is in host memory between updates, or whose moments are in bfloat16 (2412.19437, section 3.3).

Megatron has an optimizer for each: one that computes Adam on the host's processors, and one whose state has other
dtypes. Both run on GPUs only. This one takes their place in Megatron's DistributedOptimizer and does both: an update
brings the state of some weights to the device in float32, computes AdamW there with torch's own function, and stores
the state again. So nothing is computed on the host, and results do not depend on where the state is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from megavlm.config.train_section import TrainSettings
from megavlm.platform import on_gpu
from megavlm.platform.host_memory import HostMemory

AT_A_TIME = 2**25
"""Numbers of weights that are updated together: 400 MB of state in float32. A larger weight is updated alone."""
MASTER, MOMENTS = "master_param", ("exp_avg", "exp_avg_sq")
"""The names of the state, which are Megatron's."""
_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class StoredAdam(torch.optim.AdamW):
    """AdamW for pieces of a model's own weights, with a float32 copy of half-precision weights in its state.

    Megatron's DistributedOptimizer gives gradients as ``weight.decoupled_grad``, float32 and on the weight's device.

    Args:
        params, lr, betas, eps, weight_decay: as for torch's AdamW. A group may have its own ``lr`` and
            ``weight_decay``.
        on_host: whether the state is in host memory between updates, page-locked on a GPU.
        moments: the dtype of the moments between updates.
        other: what Megatron says to Transformer Engine's Adam in addition, which needs no saying here.

    Attributes:
        steps: the number of updates so far, the same for all weights.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        on_host: bool,
        moments: torch.dtype,
        **other: Any,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.on_host, self.moments, self.steps = on_host, moments, 0
        self._is_moving, self._memory = False, HostMemory()

    def fill(self) -> None:
        """Creates the initial state of all weights that have none yet: copies of them, and moments of 0."""
        for weight in (w for group in self.param_groups for w in group["params"] if not self.state[w]):
            self.initialize_state(weight)

    def initialize_state(self, weight: Tensor) -> None:
        """Creates the initial state of a weight. Megatron's name."""
        self.state[weight] = {name: self._storage(weight, self.moments).zero_() for name in MOMENTS}
        if weight.dtype == torch.float32:
            self.state[weight][MASTER] = weight.detach()
        else:
            self.state[weight][MASTER] = self._storage(weight, torch.float32).copy_(weight.detach())

    def _storage(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.on_host and on_gpu():
            return self._memory.take(weight.numel(), dtype)
        return torch.empty(weight.numel(), dtype=dtype, device=weight.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Megatron gives no closure
        """Updates all weights that have a ``decoupled_grad``. The host does not wait for the device."""
        self.fill()
        self.steps += 1
        for group in self.param_groups:
            for weights in _some(w for w in group["params"] if getattr(w, "decoupled_grad", None) is not None):
                self._update(weights, group)
        self._is_moving = self.on_host

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        brought = [
            [
                w if name == MASTER and w.dtype == torch.float32 else self._brought(w, name)
                for name in (MASTER, *MOMENTS)
            ]
            for w in weights
        ]
        masters, means, squares = map(list, zip(*brought, strict=True))
        on_gpu = weights[0].is_cuda
        steps = torch.full((len(weights),), self.steps - 1.0, device=weights[0].device if on_gpu else "cpu")
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            [weight.decoupled_grad for weight in weights],  # type: ignore[attr-defined]  # Megatron's
            means,
            squares,
            [],
            list(steps.unbind()),
            fused=on_gpu,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for weight, tensors in zip(weights, brought, strict=True):
            if tensors[0] is not weight:
                weight.copy_(tensors[0])
            for name, tensor in zip((MASTER, *MOMENTS), tensors, strict=True):
                if tensor is not self.state[weight][name] and tensor is not weight:
                    self.state[weight][name].copy_(tensor, non_blocking=True)

    def _brought(self, weight: Tensor, name: str) -> Tensor:
        """The state in float32 on the weight's device: itself if that is how it is stored."""
        stored = self.state[weight][name]
        if not self.on_host and stored.dtype == torch.float32:
            return stored
        # Later copies to the host and back are in the order of this stream, so nothing has to be waited for.
        return torch.empty_like(stored, dtype=torch.float32, device=weight.device).copy_(stored, non_blocking=True)

    def get_unscaled_state(self, weight: Tensor, name: str) -> Tensor:
        """float32 [n]: a state of a weight for a checkpoint. Megatron's name.

        It is the optimizer's own or, of what is page-locked or rounded, a copy in host memory: the forked process that
        writes a checkpoint does not see page-locked memory.
        """
        stored = self.state[weight][name]
        if stored.dtype == torch.float32 and not stored.is_pinned():
            return stored
        if self._is_moving and weight.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._is_moving = False
        return torch.empty(stored.numel(), dtype=torch.float32, device="cpu").copy_(stored)

    def set_scaled_state(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Takes a state of a weight from a checkpoint. Megatron's name."""
        self.state[weight][name].copy_(value.view(-1))

    def held(self) -> Iterator[Tensor]:
        """The state of all weights, without what is a float32 weight itself."""
        for weight, state in self.state.items():
            yield from (state[name] for name in (MASTER, *MOMENTS) if name != MASTER or weight.dtype != torch.float32)


def _some(weights: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """The weights, as many at a time as have ``AT_A_TIME`` numbers, or one."""
    found: list[Tensor] = []
    for weight in weights:
        if found and sum(w.numel() for w in found) + weight.numel() > AT_A_TIME:
            yield found
            found = []
        found.append(weight)
    if found:
        yield found


def state_bytes(train: TrainSettings) -> int:
    """Bytes of Adam's state for each number of a half-precision weight: its float32 copy and two moments."""
    return 4 + 2 * _MOMENTS[train.adam_moments].itemsize


def is_stored(train: TrainSettings) -> bool:
    """Whether Adam's state is in host memory, or its moments in bfloat16."""
    return train.offload_optimizer or train.adam_moments != "fp32"


@contextmanager
def chosen(train: TrainSettings, config: OptimizerConfig) -> Iterator[None]:
    """Within the block, Megatron builds its DistributedOptimizer with ``StoredAdam`` if the settings need it.

    Megatron knows one precision-aware Adam, that of Transformer Engine, and looks for it when it is imported and when
    its configuration is made. ``config`` is told here, and keeps it.
    """
    if not is_stored(train):
        yield
        return
    config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True

    def build(params: ParamsT, **settings: Any) -> StoredAdam:
        return StoredAdam(params, on_host=train.offload_optimizer, moments=_MOMENTS[train.adam_moments], **settings)

    changes = {"Adam": build, "USING_PYTORCH_OPTIMIZER": False}
    before = {name: getattr(megatron_optimizer, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(megatron_optimizer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(megatron_optimizer, name, value)
