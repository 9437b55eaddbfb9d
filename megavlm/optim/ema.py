"""An exponential moving average of the trained weights (``train.ema``).

It is float32 and stands beside Adam's moments: each data-parallel rank has the average of those weights that it
updates, so it is divided, saved and loaded as they are.
"""

from collections.abc import Iterable

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

EMA = "ema"
"""The name of the average in Adam's state, and in the keys of a checkpoint: ``optimizer.state.ema.KEY``."""


def fill_adam(optimizer: DistributedOptimizer) -> None:
    """Creates Adam's initial state, which torch does not create before the first step."""
    adam = optimizer.optimizer
    if not isinstance(adam, torch.optim.Adam):
        optimizer.init_state_fn(adam, optimizer.config)
        return
    for parameter in _weights(optimizer):  # neither TE nor Apex is installed
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter].update({"step": torch.zeros(()), **moments})


@torch.no_grad()
def start_averages(optimizers: Iterable[DistributedOptimizer]) -> None:
    """Begins the averages with the present weights."""
    for optimizer in optimizers:
        fill_adam(optimizer)
        adam = optimizer.optimizer
        if hasattr(adam, "name_to_dtype_map"):  # Transformer Engine's FusedAdam asks it for the dtype of each tensor
            adam.name_to_dtype_map[EMA] = torch.float32
        for weight in _weights(optimizer):
            adam.state[weight][EMA] = weight.detach().float().clone()


@torch.no_grad()
def update_averages(optimizers: Iterable[MegatronOptimizer], decay: float) -> None:
    """average ← decay · average + (1 − decay) · weight, for all weights. The host does not wait for the device."""
    for optimizer in optimizers:
        weights = _weights(optimizer)
        if weights:
            averages = [optimizer.optimizer.state[weight][EMA] for weight in weights]
            torch._foreach_lerp_(averages, weights, 1 - decay)


def has_average(optimizer: MegatronOptimizer) -> bool:
    """Whether an optimizer keeps the average of its weights."""
    state = optimizer.optimizer.state  # which makes an entry for each weight that it is asked for by brackets
    return any(EMA in state.get(weight, {}) for weight in _weights(optimizer))


def _weights(optimizer: MegatronOptimizer) -> list[Tensor]:
    """The float32 weights that the optimizer updates on this rank."""
    return [weight for group in optimizer.optimizer.param_groups for weight in group["params"]]
