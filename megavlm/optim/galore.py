"""GaLore: Adam whose moments live in a low-rank projection of each gradient (arXiv:2403.03507).

Of a weight W [m, n], m ≤ n, with gradient G, P [m, r] is the r first left singular vectors of G, renewed every
N steps, and

    R = Pᵀ G                       [r, n]: what Adam sees, with its usual moments and bias correction
    W ← W − lr · (α · P · Adam(R) + weight_decay · W)

and mirrored with right singular vectors where m > n. All weights learn; the state is (m + 2 n) r numbers instead of
2 m n. Moments stay as they are when P is renewed, as in the authors' code.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class GaLore(torch.optim.Optimizer):
    """AdamW with decoupled weight decay as ``torch.optim.AdamW`` has it, and projected moments of matrices.

    A tensor that is no matrix, has a side of at most ``rank``, or is in ``whole``, is updated by plain AdamW.

    Args:
        params: as torch's optimizers take them; keys ``lr`` and ``weight_decay`` of a group count for it.
        lr, betas, eps, weight_decay: AdamW's.
        rank: r. update_every: N, steps between two projectors. scale: α.
        whole: tensors that are not projected.
        group: ranks that hold the same weights and gradients; a matrix's projector comes from one of them, so that no
            difference between two devices' eigenvectors can part the replicas. None: this process alone.
    """

    def __init__(
        self,
        params,
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
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.eps = betas, eps
        self.rank, self.update_every, self.scale = rank, update_every, scale
        self.steps = 0  # all tensors are updated together
        self._whole, self._group = set(whole), group

    def is_projected(self, weight: Tensor) -> bool:
        """Whether this tensor's moments are projected."""
        return weight.ndim == 2 and min(weight.shape) > self.rank and weight not in self._whole

    def state_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Shapes of this tensor's state; all of it has the tensor's own dtype."""
        if not self.is_projected(weight):
            return dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(weight.shape))
        m, n = weight.shape
        moments = (self.rank, n) if m <= n else (m, self.rank)
        return {"exp_avg": moments, "exp_avg_sq": moments, "projector": (min(m, n), self.rank)}

    def fill(self) -> None:
        """Gives every tensor the state of one that has seen nothing; one that has a state keeps it."""
        for weight in (w for group in self.param_groups for w in group["params"] if not self.state[w]):
            self.state[weight] = {name: weight.new_zeros(shape) for name, shape in self.state_shapes(weight).items()}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every tensor from its ``grad``; those without one stay."""
        assert closure is None
        self.fill()
        if self.steps % self.update_every == 0:
            self._renew()
        self.steps += 1
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                self._update(weight, group["lr"], group["weight_decay"])

    def _renew(self) -> None:
        """New projectors for all matrices: each rank of ``group`` works out its share of them, and all get all."""
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        weights = [w for w in weights if self.is_projected(w)]
        ranks, rank = (self._group.size(), self._group.rank()) if self._group is not None else (1, 0)
        for weight in weights[rank::ranks]:
            gradient = weight.grad if weight.shape[0] <= weight.shape[1] else weight.grad.T
            self.state[weight]["projector"].copy_(leading_vectors(gradient, self.rank))
        for number, weight in enumerate(weights if ranks > 1 else ()):
            dist.broadcast(self.state[weight]["projector"], group=self._group, group_src=number % ranks)

    def _update(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient, scale = self.state[weight], weight.grad, 1.0
        projector, wide = state.get("projector"), weight.ndim == 2 and weight.shape[0] <= weight.shape[1]
        if projector is not None:
            gradient, scale = projector.T @ gradient if wide else gradient @ projector, self.scale
        (beta1, beta2), mean, square = self.betas, state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        update = mean / root
        if projector is not None:
            update = projector @ update if wide else update @ projector.T
        weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale / (1 - beta1**self.steps))


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors of a floating [m, n], m ≤ n, as [m, rank] of its dtype, largest first.

    They are eigenvectors of the [m, m] product with its transpose, at a fraction of a decomposition's cost; in float64,
    since its eigenvalues are the singular values squared. The largest entry of each is positive: moments live through a
    renewal, so that signs matter.
    """
    matrix64 = matrix.double()
    _, vectors = torch.linalg.eigh(matrix64 @ matrix64.T)  # ascending
    vectors = vectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).to(matrix.dtype)
