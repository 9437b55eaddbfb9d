"""Losses of sampled answers, which make answers with a positive advantage likelier.

A loss has four parts, and each can be replaced: the ratio of the probabilities (of a token or of an answer), the
surrogate (the function here), the correction of the sampler (``correction``) and the reduction (``reductions``). A loss
is a function here and an entry of ``POLICY_LOSSES`` (``align/loss_tables.py``).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megavlm.align.loss_tables import POLICY_LOSSES, PolicyLoss
from megavlm.align.losses.arguments import entry_of
from megavlm.align.losses.divergence import KL_ESTIMATES, log_ratio
from megavlm.align.losses.reductions import REDUCTIONS, answer_mean

# The loss of each token, and whether the limits of the loss have taken its gradient away.
Surrogate = tuple[Tensor, Tensor]


def clip(
    ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
) -> Surrogate:
    """PPO (1707.06347): max(−rA, −clip(r, 1 − ε, 1 + ε_high) A); dual clip c (1912.09729): at most −cA where A < 0."""
    high = epsilon if epsilon_high is None else epsilon_high
    plain, limited = -ratio * advantages, -ratio.clamp(1 - epsilon, 1 + high) * advantages
    losses, clipped = torch.maximum(plain, limited), limited > plain
    if dual_clip is not None:
        most = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        losses, clipped = torch.minimum(losses, most), clipped | (losses > most)
    return losses, clipped


def sapo(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Surrogate:
    """SAPO (2511.20347): −A (4/τ) σ(τ (r − 1)): a soft limit, whose gradient fades on both sides of r = 1."""
    tau = torch.full_like(ratio, tau_neg).masked_fill(advantages > 0, tau_pos)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), torch.zeros_like(ratio, dtype=torch.bool)


def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, epsilon_high: float = 5.0) -> Surrogate:
    """CISPO (2506.13585): −sg(min(r, ε_high)) A log π: limits the weight of a token, and never drops its gradient.

    ε_high is the largest ratio itself, not its distance from 1. The second result is where the weight was limited.
    """
    return -ratio.detach().clamp(max=epsilon_high) * advantages * logprobs, ratio > epsilon_high


def check_policy(name: str, options: Mapping[str, Any]) -> PolicyLoss:
    """Returns the loss with this name. Raises ValueError if there is none, or if it does not accept the options."""
    return entry_of(POLICY_LOSSES, "policy", name, options)


def token_losses(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    beta: float | None = None,
    weights: Tensor | None = None,
    answer_mean: Callable[[Tensor, Tensor], Tensor] = answer_mean,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the loss of each token before the reduction, its ratio, whether it was limited, and its divergence.

    All tensors have one shape: [B, T], or any other if ``answer_mean`` understands it. Arguments as in ``policy_loss``.
    The divergence (k3, without gradient) is None without a reference.
    """
    loss = check_policy(name, options)
    beta = loss.beta if beta is None else beta
    if beta < 0:
        raise ValueError(f"beta is {beta}: it must be at least 0")
    if beta and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is None, but beta is {beta:g}: give them, or set beta to 0")
    differences = log_ratio(logprobs, old_logprobs.detach())
    if loss.ratio == "sequence":
        # The value is that of the answer and the gradient that of the token. Where an answer has one advantage, the
        # mean over its tokens has the gradient s A ∇ (mean of logprobs), and no rank needs the gradients of another.
        differences = answer_mean(differences.detach(), mask) + differences - differences.detach()
    ratio = differences.exp()
    losses, limited = loss.function(ratio, advantages.detach(), logprobs, **{**loss.options, **options})
    if weights is not None:  # of the sampler's correction, which has nothing to do with the divergence
        losses = losses * weights.detach()
    if ref_logprobs is None:
        return losses, ratio.detach(), limited, None
    divergence = KL_ESTIMATES["k3"](log_ratio(logprobs, ref_logprobs.detach()))
    return losses + beta * divergence, ratio.detach(), limited, divergence.detach()


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    beta: float | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of a whole batch of sampled answers, and metrics.

    r = exp(logprobs − old_logprobs), for gspo its geometric mean over the answer:

    ======= ===================================== ========== ==================================================
    name    loss of a token                       reduction  options
    ======= ===================================== ========== ==================================================
    ppo     max(−rA, −clip(r, 1−ε, 1+ε_high) A)   token      epsilon 0.2, epsilon_high ε, dual_clip none
    grpo    the same, + β k3                      sequence   the same; beta 0.03
    dr_grpo the same                              constant   the same
    dapo    the same                              token      the same, but epsilon_high 0.28
    gspo    the same                              sequence   epsilon 3e-4, epsilon_high 4e-4, dual_clip none
    sapo    −A (4/τ) σ(τ (r − 1))                 sequence   tau_pos 1, tau_neg 1.05: τ where A > 0, and elsewhere
    cispo   −sg(min(r, ε_high)) A logprobs        token      epsilon_high 5
    ======= ===================================== ========== ==================================================

    Args:
        name: a key of ``POLICY_LOSSES``; the functions cite the papers.
        logprobs: floating [B, T], log-probabilities of the sampled tokens under the policy.
        old_logprobs: [B, T], the same under the policy that sampled; no gradient flows to them.
        advantages: [B, T], or [B, 1] for advantages of whole answers.
        mask: [B, T], true or 1 at target tokens.
        ref_logprobs: [B, T], the same under the reference model; no gradient flows to them. Given with a beta of 0,
            they are only measured (``kl``).
        beta: weight of the divergence from the reference; null: 0.03 for grpo, otherwise 0.
        max_length: only for dr_grpo: the constant length by which it divides; null: T.
        weights: [B, T], from ``correction``, factors of the loss without the divergence; null: 1.
        options: the options in the table.

    Returns:
        The loss, a 0-d tensor, and metrics without gradient: ``ratio_mean`` and ``ratio_max``; ``clip_share``, the
        fraction of target tokens whose ratio was limited; ``kl``, the mean of k3 (with a reference).

    Raises:
        ValueError: the name is unknown, the loss does not have an option or it is out of range, or shapes differ.
    """
    shape = logprobs.shape
    given = {"old_logprobs": old_logprobs, "mask": mask, "ref_logprobs": ref_logprobs, "weights": weights}
    for argument, tensor in given.items():
        if tensor is not None and (tensor.shape != shape or logprobs.ndim != 2):
            raise ValueError(
                f"{argument} has shape {list(tensor.shape)} and logprobs {list(shape)}: both must be [B, T]"
            )
    if advantages.shape not in (shape, (shape[0], 1)):
        raise ValueError(f"advantages has shape {list(advantages.shape)}: it must be {list(shape)} or [{shape[0]}, 1]")
    # whatever is outside the mask, even infinite, has no influence
    logprobs, old_logprobs = logprobs.where(mask.bool(), 0.0), old_logprobs.where(mask.bool(), 0.0)
    ref_logprobs = None if ref_logprobs is None else ref_logprobs.where(mask.bool(), 0.0)
    mask = mask.to(logprobs.dtype)
    losses, ratio, limited, divergence = token_losses(
        name,
        logprobs,
        old_logprobs,
        advantages.expand(shape),
        mask,
        ref_logprobs,
        beta=beta,
        weights=weights,
        **options,
    )
    if POLICY_LOSSES[name].reduction != "constant" and max_length is not None:
        raise ValueError(f"{name} has no option max_length: only dr_grpo divides by a constant length")
    reduction, lengths = REDUCTIONS[POLICY_LOSSES[name].reduction], mask.sum(-1, keepdim=True)
    shares, count = reduction.weights(mask, lengths, max_length or shape[1]), reduction.count(lengths[:, 0])
    tokens = mask.sum().clamp(min=1)
    metrics = {
        "ratio_mean": (ratio * mask).sum() / tokens,
        "ratio_max": (ratio * mask).max(),
        "clip_share": (limited * mask).sum() / tokens,
    }
    if divergence is not None:
        metrics["kl"] = (divergence * mask).sum() / tokens
    return (losses * shares).sum() / count.clamp(min=1), metrics
