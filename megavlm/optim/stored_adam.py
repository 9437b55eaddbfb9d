"""AdamW whose state is in host memory between updates, or whose moments are in bfloat16 (2412.19437, section 3.3).

Megatron has an optimizer for each: one that computes Adam on the host's processors, and one whose state has other
dtypes. Both run on GPUs only. This one takes their place in Megatron's DistributedOptimizer and does both: an update
brings the state of some weights to the device in float32, computes AdamW there with torch's own function, and stores
the state again. So nothing is computed on the host, and results do not depend on where the state is.
"""

from collections.abc import Iterable, Iterator
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
"""Numbers of weights that are updated together: 400 MB of state in float32."""
MASTER, MOMENTS = "master_param", ("exp_avg", "exp_avg_sq")
"""The names of the state, which are Megatron's."""
_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class StoredAdam(torch.optim.AdamW):
    """AdamW for pieces of a model's own weights, with a float32 copy of half-precision weights in its state.

    Megatron's DistributedOptimizer gives the weights as vectors, and all of their gradients as
    ``weight.decoupled_grad``, float32 and on the weight's device.

    Args:
        params: as for torch's AdamW; a group may have its own ``lr`` and ``weight_decay``.
        on_host: whether the state is in host memory between updates, page-locked on a GPU.
        moments: the dtype of the moments between updates.
        settings: ``lr``, ``betas``, ``eps`` and ``weight_decay`` for torch's AdamW, and others that Megatron has for
            Transformer Engine's Adam, which need no saying here.

    Attributes:
        steps: the number of updates so far.
    """

    def __init__(self, params: ParamsT, *, on_host: bool, moments: torch.dtype, **settings: Any):
        super().__init__(params, **{name: settings[name] for name in ("lr", "betas", "eps", "weight_decay")})
        self.on_host, self.steps = on_host, 0
        self._kinds = {MASTER: torch.float32, **dict.fromkeys(MOMENTS, moments)}
        self._memory: list[HostMemory] = []

    def fill(self) -> None:
        """Creates the initial state of all weights that have none yet: copies of them, and moments of 0."""
        weights = [w for group in self.param_groups for w in group["params"] if not self.state[w]]
        in_block = self.on_host and on_gpu()
        if in_block:
            kinds = self._kinds.values()
            self._memory.append(HostMemory([w.numel() * dtype.itemsize for w in weights for dtype in kinds]))
        for weight in weights:
            for name, dtype in self._kinds.items():
                if in_block:
                    tensor = self._memory[-1].take(weight.numel(), dtype)
                else:
                    tensor = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
                self.state[weight][name] = tensor.copy_(weight.detach()) if name == MASTER else tensor.zero_()

    def initialize_state(self, weight: Tensor) -> None:
        """Creates the initial state of all weights. Megatron's name, for one of them."""
        self.fill()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Megatron gives no closure
        """Updates all weights that have a ``decoupled_grad``. The host does not wait for the device."""
        self.fill()
        self.steps += 1
        for group in self.param_groups:
            weights = (w for w in group["params"] if getattr(w, "decoupled_grad", None) is not None)
            for spans in _some(weights):
                self._update(spans, group)

    def _update(self, spans: list[tuple[Tensor, slice]], group: dict[str, Any]) -> None:
        stored = [[self.state[weight][name][span] for name in self._kinds] for weight, span in spans]
        brought = [[self._brought(tensor, spans[0][0].device) for tensor in of] for of in stored]
        masters, means, squares = map(list, zip(*brought, strict=True))
        where = spans[0][0].device
        on_gpu = where.type == "cuda"
        steps = torch.full((len(spans),), self.steps - 1.0, device=where if on_gpu else "cpu")
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            [weight.decoupled_grad[span] for weight, span in spans],  # type: ignore[attr-defined]  # Megatron's
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
        for (weight, span), places, tensors in zip(spans, stored, brought, strict=True):
            weight[span].copy_(tensors[0])
            for place, tensor in zip(places, tensors, strict=True):
                if tensor is not place:
                    place.copy_(tensor, non_blocking=True)

    def _brought(self, stored: Tensor, device: torch.device) -> Tensor:
        """A state in float32 on the device: itself if that is how it is stored."""
        if not self.on_host and stored.dtype == torch.float32:
            return stored
        # Later copies to the host and back are in the order of this stream, so nothing has to be waited for.
        return torch.empty_like(stored, dtype=torch.float32, device=device).copy_(stored, non_blocking=True)

    def arrive(self) -> None:
        """Waits until the host can read what the last update has sent to host memory."""
        if self.on_host and on_gpu():
            torch.cuda.current_stream().synchronize()

    def get_unscaled_state(self, weight: Tensor, name: str) -> Tensor:
        """[n]: a state of a weight as it is stored. Megatron's name. See ``arrive`` and ``readable``."""
        return self.state[weight][name]

    def set_scaled_state(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Takes a state of a weight from a checkpoint. Megatron's name."""
        self.state[weight][name].copy_(value.view(-1))

    def held(self) -> Iterator[Tensor]:
        """The state of all weights."""
        yield from (state[name] for state in self.state.values() for name in self._kinds)


def readable(stored: Tensor) -> Tensor:
    """A stored state in float32, for the forked process that writes a checkpoint and does not see page-locked memory.

    It is the same tensor, or a copy in host memory of what is page-locked or rounded. See ``StoredAdam.arrive``.
    """
    if stored.dtype == torch.float32 and not stored.is_pinned():
        return stored
    return torch.empty(stored.numel(), dtype=torch.float32, device="cpu").copy_(stored)


def _some(weights: Iterable[Tensor]) -> Iterator[list[tuple[Tensor, slice]]]:
    """Parts of the weights that have ``AT_A_TIME`` numbers together."""
    found: list[tuple[Tensor, slice]] = []
    room = AT_A_TIME
    for weight in weights:
        first = 0
        while first < weight.numel():
            last = min(weight.numel(), first + room)
            found.append((weight, slice(first, last)))
            room -= last - first
            first = last
            if not room:
                yield found
                found, room = [], AT_A_TIME
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
