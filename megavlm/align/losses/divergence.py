"""Estimates of the divergence of a policy from its reference model, from the tokens that were sampled."""

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Log-ratios of probabilities are limited to ± this, so that their exponentials stay finite in float32."""


def log_ratio(logprobs: Tensor, others: Tensor) -> Tensor:
    """Returns ``logprobs - others`` within ± ``LARGEST_LOG_RATIO``. Beyond these limits, there is no gradient."""
    return (logprobs - others).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# From the log-ratio k1 = log π − log π_ref (Schulman, "Approximating KL divergence", 2020).
KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda k1: k1,
    "k2": lambda k1: k1.square() / 2,
    "k3": lambda k1: torch.expm1(-k1) + k1,
}


def kl_estimate(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimates KL(policy ‖ reference) at each token.

    k1 and k3 are unbiased and k3 is never negative; k2 has a small bias and the gradient of the true divergence.

    Args:
        name: k1 (the log-ratio), k2 (k1² / 2) or k3 (exp(−k1) + k1 − 1).
        logprobs, ref_logprobs: log-probabilities of the sampled tokens, in the same shape. Gradients flow to both.

    Returns:
        The estimates, in the shape and dtype of ``logprobs``.

    Raises:
        ValueError: the name is unknown, or the shapes differ.
    """
    if name not in KL_ESTIMATES:
        raise ValueError(f"{name!r} is no estimate of the divergence: choose one of {', '.join(KL_ESTIMATES)}")
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}, but ref_logprobs has {list(ref_logprobs.shape)}")
    return KL_ESTIMATES[name](log_ratio(logprobs, ref_logprobs))
