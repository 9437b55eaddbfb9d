"""GaLore: Adam with moments of a low-rank projection of each gradient (arXiv:2403.03507).

For a weight W [m, n] with m ≤ n and gradient G, the projector P [m, r] consists of the first r left singular vectors
of G. It is computed again every N steps. Then

    R = Pᵀ G                       [r, n]: the input of Adam, with its usual moments and bias correction
    W ← W − lr · (α · P · Adam(R) + weight_decay · W)

If m > n, the right singular vectors are used in the same way. All weights are trained. The state has (m + 2 n) r
numbers instead of 2 m n. The moments are kept when P changes, as in the authors' code.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megavlm.optim.own_optimizer import OwnOptimizer


class GaLore(OwnOptimizer):
    """AdamW with decoupled weight decay as in ``torch.optim.AdamW``, and projected moments for matrices.

    A tensor that is not a matrix, has a side of at most ``rank``, or is in ``whole``, is updated by plain AdamW.

    Args:
        params: as for torch's optimizers; a group may have its own ``lr`` and ``weight_decay``.
        lr: AdamW's learning rate.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay.
        rank: r, the rank of the projection.
        update_every: N, the number of steps between two computations of the projectors.
        scale: α, the scale of the update.
        whole: tensors that are not projected.
        group: ranks with the same weights and gradients. One of them computes the projector of a matrix and broadcasts
            it, so that differences between the eigenvectors of two devices cannot make the replicas diverge. None:
            only this process.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_every: int = 200,
        scale: float = 0.25,
        whole: Iterable[Tensor] = (),
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, group=group)
        self.rank, self.update_every, self.scale, self._whole = rank, update_every, scale, set(whole)

    def is_projected(self, weight: Tensor) -> bool:
        """Whether this tensor's moments are projected."""
        return weight.ndim == 2 and min(weight.shape) > self.rank and weight not in self._whole

    def state_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """See ``OwnOptimizer``."""
        if not self.is_projected(weight):
            return dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(weight.shape))
        m, n = weight.shape
        moments = (self.rank, n) if m <= n else (m, self.rank)
        return {"exp_avg": moments, "exp_avg_sq": moments, "projector": (min(m, n), self.rank)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Updates each tensor that has a ``grad``."""
        assert closure is None
        self.fill()
        if self.steps % self.update_every == 0:
            self._renew()
        self.steps += 1
        for weight, lr, weight_decay in self.learning():
            self._update(weight, lr, weight_decay)

    def _renew(self) -> None:
        """Computes new projectors of all matrices: each rank of ``group`` computes its share and broadcasts it."""
        weights = [weight for weight, _, _ in self.learning() if self.is_projected(weight)]
        rank, ranks = self.share
        for weight in weights[rank::ranks]:
            assert weight.grad is not None
            gradient = weight.grad if weight.shape[0] <= weight.shape[1] else weight.grad.T
            self.state[weight]["projector"].copy_(leading_vectors(gradient, self.rank))
        for number, weight in enumerate(weights if ranks > 1 else ()):
            dist.broadcast(self.state[weight]["projector"], group=self.group, group_src=number % ranks)

    def _update(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        assert weight.grad is not None
        state, gradient, scale = self.state[weight], weight.grad, 1.0
        projector, wide = state.get("projector"), weight.ndim == 2 and weight.shape[0] <= weight.shape[1]
        if projector is not None:
            gradient, scale = projector.T @ gradient if wide else gradient @ projector, self.scale
        mean, root = self.moments(state, gradient)
        update = mean / root
        if projector is not None:
            update = projector @ update if wide else update @ projector.T
        weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale / (1 - self.betas[0] ** self.steps))


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors of a floating [m, n] matrix, m ≤ n, as [m, rank] of the same dtype.

    They are the eigenvectors of the matrix times its transpose, [m, m], which costs a fraction of a singular value
    decomposition. It is computed in float64, because the eigenvalues are the squares of the singular values. The signs
    are chosen such that the largest entry of each vector is positive: moments are kept when the projector changes, so
    the signs must be reproducible.
    """
    matrix64 = matrix.double()
    _, vectors = torch.linalg.eigh(matrix64 @ matrix64.T)  # ascending
    vectors = vectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).to(matrix.dtype)
