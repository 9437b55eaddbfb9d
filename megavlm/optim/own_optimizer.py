"""What the optimizers share that Megatron does not have (GaLore, Muon): AdamW's moments, and state of known shapes."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT


class OwnOptimizer(torch.optim.Optimizer):
    """An optimizer whose state exists before its first step, so that a checkpoint can be loaded into it.

    Args:
        params: as for torch's optimizers; a group may have its own ``lr`` and ``weight_decay``.
        lr: the learning rate.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: the weight decay.
        group: ranks with the same weights and gradients, which share work; None: only this process.

    Attributes:
        steps: the number of updates so far, the same for all tensors.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        group: dist.ProcessGroup | None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.eps, self.group, self.steps = betas, eps, group, 0

    def state_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Shapes of this tensor's state; all state tensors have the dtype of the tensor."""
        raise NotImplementedError

    def fill(self) -> None:
        """Creates the initial state of all tensors that have none yet."""
        for weight in (w for group in self.param_groups for w in group["params"] if not self.state[w]):
            self.state[weight] = {name: weight.new_zeros(shape) for name, shape in self.state_shapes(weight).items()}

    def learning(self) -> Iterator[tuple[Tensor, float, float]]:
        """Each tensor that has a ``grad``, with its learning rate and weight decay."""
        for group in self.param_groups:
            yield from ((w, group["lr"], group["weight_decay"]) for w in group["params"] if w.grad is not None)

    @property
    def share(self) -> tuple[int, int]:
        """(rank, ranks) in ``group``: every ``ranks``-th piece of work from ``rank`` on is this process's."""
        return (self.group.rank(), self.group.size()) if self.group is not None else (0, 1)

    def moments(self, state: dict[str, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Updates AdamW's moments. Returns the first one, not yet corrected, and the root of the second one."""
        (beta1, beta2), mean, square = self.betas, state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return mean, (square / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
