"""Advantages: how much better an answer, or a token, is than was to be expected."""

import math
from typing import Any

import torch
from torch import Tensor

from megavlm.align.loss_tables import ADVANTAGES, function_of, keyword_options
from megavlm.align.losses.arguments import check_numbers


def grpo(rewards: Tensor, known: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """GRPO (2402.03300): (R − mean) / (standard deviation + eps) of the group."""
    from_mean = dr_grpo(rewards, known)
    degrees = known.sum(-1, keepdim=True) - ddof
    deviation = (from_mean.square().sum(-1, keepdim=True) / degrees.clamp(min=1)).sqrt()
    return from_mean / (deviation + eps)


def dr_grpo(rewards: Tensor, known: Tensor) -> Tensor:
    """Dr. GRPO (2503.20783): R − mean of the group."""
    mean = rewards.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known, rewards - mean, 0.0)


def rloo(rewards: Tensor, known: Tensor) -> Tensor:
    """RLOO (2402.14740): R − mean of the others of the group."""
    count = known.sum(-1, keepdim=True)
    return dr_grpo(rewards, known) * count / (count - 1).clamp(min=1)


def options_of(name: str) -> dict[str, Any]:
    """The options of an advantage and their defaults. Raises ValueError for an unknown name."""
    if name not in ADVANTAGES:
        raise ValueError(f"{name!r} is no advantage: choose one of {', '.join(ADVANTAGES)}")
    return keyword_options(function_of("advantages", ADVANTAGES[name]))


def advantages(name: str, rewards: Tensor, group_size: int, **options: float) -> Tensor:
    """Computes the advantage of each answer from the rewards of its group.

    It is computed in float64. A group whose rewards are all equal has advantages of exactly 0, and so has a group with
    fewer than two rewards.

    Args:
        name: grpo, dr_grpo or rloo; the functions cite the papers.
        rewards: floating [B]; the groups stand one after the other. NaN is the reward of an answer that could not be
            judged: it is left out of its group and gets the advantage 0.
        group_size: number of answers to each prompt, at least 2; B must be a multiple of it.
        options: only for grpo: ``ddof`` (0 or 1, what is subtracted from the number of answers in the variance;
            default 1) and ``eps`` (added to the standard deviation; default 1e-6).

    Returns:
        [B], float64 if ``rewards`` is, otherwise float32.

    Raises:
        ValueError: the name or an option is unknown or out of range, or the shapes do not fit.
    """
    defaults = options_of(name)
    for option in options:
        if option not in defaults:
            allowed = f"only {', '.join(defaults)}" if defaults else "and needs none"
            raise ValueError(f"{name} has no option {option}, {allowed}: remove the option")
    check_numbers(**options)
    if options.get("ddof", 1) not in (0, 1):
        raise ValueError(f"ddof is {options['ddof']}: it must be 0 or 1")
    if not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size is {group_size!r}: it must be an integer, at least 2, to compare answers")
    if rewards.ndim != 1 or len(rewards) % group_size or not rewards.is_floating_point():
        raise ValueError(
            f"rewards has shape {list(rewards.shape)} and dtype {rewards.dtype}: it must be floating [B], where B is a "
            f"multiple of group_size = {group_size}"
        )
    grouped = rewards.detach().double().view(-1, group_size)
    known = ~grouped.isnan()
    highest = grouped.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    lowest = grouped.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    found = function_of("advantages", ADVANTAGES[name])(torch.where(known, grouped, 0.0), known, **options)
    # The mean of equal rewards such as 0.9 may differ from them by a rounding error, which grpo would divide by eps.
    found = torch.where(known & (highest > lowest), found, 0.0).view(-1)
    return found if rewards.dtype == torch.float64 else found.float()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438).

    δ_t = R_t + γ V_next − V_t and A_t = δ_t + γ λ A_next, where "next" is the next token under the mask (V and A are 0
    after the last one): tokens outside the mask, such as the answer of a tool, are stepped over without discount. The
    recurrence is computed in ⌈log2 T⌉ steps, each for all tokens at once.

    Args:
        rewards, values: floating [B, T].
        mask: bool [B, T], the tokens that the policy has sampled.
        gamma, lam: γ and λ, from 0 to 1.

    Returns:
        Advantages (not whitened) and returns = advantages + values, [B, T], 0 outside the mask.

    Raises:
        ValueError: shapes differ, or γ or λ is out of range.
    """
    for argument, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{argument} is {value}: it must be between 0 and 1")
    if not rewards.shape == values.shape == mask.shape or rewards.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"rewards, values and mask have shapes {list(rewards.shape)}, {list(values.shape)} and {list(mask.shape)}, "
            f"and mask has dtype {mask.dtype}: they must be [B, T], and mask must be bool"
        )
    values = values.detach()
    value_of_next = _scan(torch.where(mask, values, 0.0), (~mask).to(values.dtype))  # V at this or the next token
    value_of_next = torch.cat([value_of_next[:, 1:], torch.zeros_like(values[:, :1])], 1)
    surprise = torch.where(mask, rewards.detach() + gamma * value_of_next - values, 0.0)
    found = _scan(surprise, torch.ones_like(values).masked_fill(mask, gamma * lam))
    found = torch.where(mask, found, 0.0)
    return found, torch.where(mask, found + values, 0.0)


def _scan(terms: Tensor, factors: Tensor) -> Tensor:
    """x_t = terms_t + factors_t · x_(t+1) from the right, [B, T], with x_T = 0."""
    span, length = 1, terms.shape[1]
    while span < length:  # terms and factors of 1, 2, 4, … tokens together
        later_terms = torch.nn.functional.pad(terms[:, span:], (0, span))
        later_factors = torch.nn.functional.pad(factors[:, span:], (0, span))
        terms, factors = terms + factors * later_terms, factors * later_factors
        span *= 2
    return terms
