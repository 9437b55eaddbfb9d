"""Muon: orthogonalised momentum for matrices (arXiv:2502.16982), and AdamW for all other weights.

For a matrix W [m, n] with gradient G and momentum μ:

    M ← μ M + (1 − μ) G
    W ← W − lr · (0.2 √max(m, n) · orthogonal(μ M + (1 − μ) G) + weight_decay · W)

``orthogonal`` makes all singular values nearly 1. The factor gives the update the size that AdamW's has, so the
learning rate of AdamW fits. W is a whole matrix of Hugging Face's model: a rank that has a piece of it, or several in
one parameter, gets the others first (``Matrices``), so the layout has no influence.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megavlm.optim.own_optimizer import OwnOptimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial that pulls singular values towards 1
_ITERATIONS = 5


class Matrices(Protocol):
    """How a parameter on this rank belongs to whole matrices."""

    def whole(self, piece: Tensor) -> list[Tensor]:
        """The whole matrices of which the parameter, or a tensor of its shape, has pieces. All ranks call it."""

    def piece(self, whole: list[Tensor]) -> Tensor:
        """The inverse: this rank's piece."""


class Muon(OwnOptimizer):
    """Muon for the weights in ``matrices``, AdamW as in ``torch.optim.AdamW`` for the others.

    Args:
        params: as for torch's optimizers; a group may have its own ``lr`` and ``weight_decay``.
        lr: the learning rate.
        matrices: for each weight that is trained by Muon, the matrices that it is a piece of.
        momentum: μ.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: the weight decay.
        group: ranks with the same weights and gradients. Each orthogonalises a share of the matrices and broadcasts
            the results. None: only this process.
        dtype: in which matrices are orthogonalised.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        matrices: Mapping[Tensor, Matrices],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, group=group)
        self.matrices, self.momentum, self._dtype = matrices, momentum, dtype

    def state_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """See ``OwnOptimizer``."""
        names = ("momentum",) if weight in self.matrices else ("exp_avg", "exp_avg_sq")
        return dict.fromkeys(names, tuple(weight.shape))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Updates each tensor that has a ``grad``."""
        assert closure is None
        self.fill()
        self.steps += 1
        of_muon = []
        for weight, lr, weight_decay in self.learning():
            if weight in self.matrices:
                of_muon.append((weight, lr, weight_decay))
            else:
                self._adam(weight, lr, weight_decay)
        rank, ranks = self.share
        own = {}  # all of them before the first broadcast, for which every rank waits
        for number, (weight, _, _) in enumerate(of_muon):
            assert weight.grad is not None
            moment = self.state[weight]["momentum"].lerp_(weight.grad, 1 - self.momentum)
            if number % ranks == rank:
                whole = self.matrices[weight].whole(weight.grad.lerp(moment, self.momentum).to(self._dtype))
                own[number] = self.matrices[weight].piece([self._update(matrix) for matrix in whole]).contiguous()
        for number, (weight, lr, weight_decay) in enumerate(of_muon):
            update = own.pop(number) if number in own else torch.empty_like(weight, dtype=self._dtype)
            if ranks > 1:
                dist.broadcast(update, group=self.group, group_src=number % ranks)
            weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)

    def _update(self, matrix: Tensor) -> Tensor:
        return orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)

    def _adam(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        assert weight.grad is not None
        mean, root = self.moments(self.state[weight], weight.grad)
        weight.mul_(1 - lr * weight_decay).addcdiv_(mean, root, value=-lr / (1 - self.betas[0] ** self.steps))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix [m, n] with nearly the same singular vectors, whose singular values are all between about 0.7 and 1.2.

    It is computed by a Newton–Schulz iteration in the dtype of the matrix; a matrix of zeros stays zero.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = wide @ wide.T
        wide = first * wide + (second * square + third * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
