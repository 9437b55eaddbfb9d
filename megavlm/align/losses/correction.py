"""Weights that correct for a sampler whose log-probabilities differ from the trainer's.

The sampler and the trainer may compute the same weights with other kernels, in another precision, or with weights of
another step. The weight of a token is the importance ratio w = π_trainer / π_sampler, limited in one of four ways.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megavlm.align.losses.arguments import check_numbers
from megavlm.align.losses.divergence import KL_ESTIMATES, log_ratio

# name → (importance ratio, lowest, highest) -> weight. The ratio of a token, or of a whole answer.
LIMITS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "truncate": lambda ratio, lowest, highest: ratio.clamp(max=highest),
    "mask": lambda ratio, lowest, highest: torch.where((ratio >= lowest) & (ratio <= highest), ratio, 0.0),
}
# name → (whether the ratio is that of a whole answer, limit, lowest, highest)
CORRECTIONS: dict[str, tuple[bool, str, float, float]] = {
    "token_truncate": (False, "truncate", 0.0, 2.0),
    "token_mask": (False, "mask", 0.5, 5.0),  # IcePop
    "sequence_truncate": (True, "truncate", 0.0, 3.0),
    "sequence_mask": (True, "mask", 0.0, 3.0),
}


def answer_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of the values [B, T] over the target tokens of each answer, at all of its tokens."""
    return (values * mask).sum(-1, keepdim=True).expand_as(values)


def correction(
    name: str,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    lowest: float | None = None,
    highest: float | None = None,
    answer_sum: Callable[[Tensor, Tensor], Tensor] = answer_sum,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the weight of each token's loss, without gradient, and how far sampler and trainer differ.

    With w = exp(old − sampler), or the exponential of the sum of the differences over an answer:

    ================= ======================================================== ==============
    name              weight                                                   lowest, highest
    ================= ======================================================== ==============
    off               1                                                        –
    token_truncate    min(w, highest)                                          –, 2
    token_mask        w, or 0 outside lowest … highest                         0.5, 5
    sequence_truncate min(w of the answer, highest)                            –, 3
    sequence_mask     w of the answer, or 0 outside lowest … highest           0, 3
    ================= ======================================================== ==============

    Args:
        name: one of the table.
        old_logprobs: floating [B, T], log-probabilities of the sampled tokens in the trainer, by its weights before the
            first update with them.
        sampler_logprobs: [B, T], the same in the sampler, by the weights that sampled: the same weights, or older ones.
        mask: [B, T], 1 at target tokens and 0 elsewhere.
        lowest, highest: limits of w; null: those of the table.
        answer_sum: sums over the target tokens of each answer; a trainer that packs answers into rows passes its own.

    Returns:
        Weights [B, T], and metrics that are also computed with ``off``: ``mismatch_kl``, the mean of k3 of the sampler
        against the trainer; ``mismatch_max``, the largest difference of two log-probabilities; ``corrected_share``, the
        fraction of target tokens whose weight was limited.

    Raises:
        ValueError: the name is unknown, or a limit is not above 0 (``lowest``: at least 0).
    """
    if name != "off" and name not in CORRECTIONS:
        raise ValueError(f"{name!r} is no correction: choose one of off, {', '.join(CORRECTIONS)}")
    differences = log_ratio(old_logprobs.detach(), sampler_logprobs.detach())
    count = mask.sum().clamp(min=1)
    metrics = {
        "mismatch_kl": (KL_ESTIMATES["k3"](-differences) * mask).sum() / count,
        "mismatch_max": (differences.abs() * mask).max() if mask.numel() else mask.new_zeros(()),
    }
    if name == "off":
        return torch.ones_like(differences), metrics | {"corrected_share": torch.zeros_like(count)}
    of_answer, limit, least, most = CORRECTIONS[name]
    lowest, highest = least if lowest is None else lowest, most if highest is None else highest
    check_numbers(lowest=lowest, highest=highest)
    if lowest < 0 or highest <= lowest:
        raise ValueError(f"lowest is {lowest} and highest is {highest}: it must be 0 ≤ lowest < highest")
    if of_answer:
        differences = log_ratio(answer_sum(differences, mask), torch.zeros_like(differences))
    ratio = differences.exp()
    weights = LIMITS[limit](ratio, lowest, highest)
    return weights, metrics | {"corrected_share": ((weights != ratio) * mask).sum() / count}
