"""The loss of KTO, for single answers that are labelled desirable or undesirable."""

import torch
from torch import Tensor

from megavlm.align.losses.arguments import check_numbers, mean, vectors


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the losses [B] of B answers (2402.01306), and metrics.

    With r = logps − ref_logps: λ_D (1 − σ(β(r − z0))) if the answer is desirable, λ_U (1 − σ(β(z0 − r))) if not.

    Args:
        logps, ref_logps: floating [B], log-probabilities summed over an answer's target tokens, under the policy and
            under the reference model. No gradient flows to the reference.
        desirable: bool [B].
        z0: one number, the reference point between desirable and undesirable answers: max(0, mean of r over prompts
            with answers to other prompts), where the mean is over the global batch. No gradient flows to it.
        beta: β, above 0.
        desirable_weight, undesirable_weight: λ_D and λ_U, at least 0.

    Returns:
        Losses [B], float64 if ``logps`` is, otherwise float32; and metrics without gradient: ``rewards/desirable`` and
        ``rewards/undesirable``, means of βr over the answers of that kind (0 without any); ``count/desirable`` and
        ``count/undesirable``, the numbers of those answers, which are the weights for averaging the means;
        ``accuracy``, the fraction of answers on the correct side of z0; ``z0``.

    Raises:
        ValueError: shapes differ, ``desirable`` is not bool, or an option is out of range.
    """
    check_numbers(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be a bool tensor [B], not {getattr(desirable, 'dtype', desirable)}")
    logps, ref_logps, _ = vectors(logps=logps, ref_logps=ref_logps, desirable=desirable)
    z0 = torch.as_tensor(z0, dtype=logps.dtype, device=logps.device).detach()
    if z0.ndim:
        raise ValueError(f"z0 has shape {list(z0.shape)}: it must be one number for all answers")

    ratio = logps - ref_logps.detach()
    surplus = torch.where(desirable, ratio - z0, z0 - ratio)  # above 0 on the correct side of z0
    loss = torch.sigmoid(-beta * surplus)  # 1 − σ(x) = σ(−x), which avoids cancellation
    losses = torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)
    # sums over masks, because boolean indexing (ratio[desirable]) would make the host wait for the GPU
    rewards, good, bad = beta * ratio.detach(), desirable.sum(), (~desirable).sum()
    return losses, {
        "rewards/desirable": (rewards * desirable).sum() / good.clamp(min=1),
        "rewards/undesirable": (rewards * ~desirable).sum() / bad.clamp(min=1),
        "count/desirable": good,
        "count/undesirable": bad,
        "accuracy": mean((surplus > 0).to(ratio.dtype)),
        "z0": z0,
    }
