"""Loss and gradient norms of a step, equal on all ranks, and whether any of them is NaN or infinite."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.model.vlm import PARTS


@dataclass(frozen=True)
class GradStats:
    """The statistics of a step, equal on all ranks.

    Attributes:
        loss: the loss, averaged over the targets of the global batch.
        norms: ``grad_norm`` before clipping and ``grad_norm/PART`` for each part, 0.0 if the part is frozen.
        non_finite: "loss" if the loss is NaN or infinite on some rank, and the parts for whose gradient this holds.
        sums: the sums of the objective over the global batch.
    """

    loss: float
    norms: dict[str, float]
    non_finite: list[str]
    sums: list[float]


def read_grad_stats(totals: Tensor, weight: float, squares: Tensor) -> GradStats:
    """Copies the loss, the gradient norms and the objective's sums to the host in one transfer.

    If only a rank with a NaN skipped its update, its weights would differ from those of the other ranks from then on.
    The flags are therefore summed over all ranks. They stay on the device until everything is copied at once.

    Args:
        totals: float32 [sums] on the device, the objective's sums over the global batch; the first is that of the loss.
        weight: sum of the loss weights over the global batch.
        squares: float32 [parts] on the device, squared gradient norm of each part.
    """
    total = totals[0]
    loss = total / max(weight, 1e-12) if math.isfinite(weight) else torch.full_like(total, math.nan)
    values = torch.cat([loss[None], squares])
    bad = count_non_finite(values)
    read = torch.cat([values, bad, totals]).tolist()
    (mean, *of_parts), flags, sums = read[: len(values)], read[len(values) : 2 * len(values)], read[2 * len(values) :]
    norms = {f"grad_norm/{part}": math.sqrt(square) for part, square in zip(PARTS, of_parts, strict=True)}
    names = [name for name, flag in zip(("loss", *PARTS), flags, strict=True) if flag]
    return GradStats(mean, {"grad_norm": math.sqrt(sum(of_parts)), **norms}, names, sums)


def count_non_finite(values: Tensor) -> Tensor:
    """The number of ranks on which each value is NaN or infinite, as float32."""
    bad = (~values.isfinite()).float()
    dist.all_reduce(bad)
    return bad
