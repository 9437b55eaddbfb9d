"""Chooses tokens: filters, a draw that depends only on the answer's seed and the token's index, log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavlm.rollout.engine import Sampling

_FIRST_CANDIDATES = 1024  # of the most likely tokens, before it is known how many of them top_p keeps


@dataclass(frozen=True)
class Drawn:
    """Tokens int64 [n], and the log-probabilities of ``Answer``, float32 [n] each."""

    tokens: Tensor
    logprobs: Tensor
    policy_logprobs: Tensor
    sampled_logprobs: Tensor


def mixed_seed(*numbers: int) -> int:
    """Returns a seed in 0 … 2⁶³ - 1 for a sequence of integers, such as (seed of the run, prompt, answer)."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _mixed(state ^ _mixed(np.array([number % 2**64], np.uint64)))
    return int(state[0] >> np.uint64(1))


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> Tensor:
    """Returns a random number in 0 ≤ u < 1 for the token with each index in the answer with each seed: float64 [n].

    There is no generator with a state: a number depends on its seed and index alone.
    """
    mixed = _mixed(_mixed(np.array(seeds, np.uint64)) + np.array(indices, np.uint64))
    return torch.from_numpy((mixed >> np.uint64(11)) * 2.0**-53)  # the 53 bits that a float64 can hold


def _mixed(x: np.ndarray) -> np.ndarray:
    """The step of the generator SplitMix64, elementwise on uint64: neighbouring numbers become unrelated ones."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits: Tensor, sampling: Sampling, chance: Tensor) -> Drawn:
    """Draws a token from each row of logits.

    Args:
        logits: float32 [n, vocabulary].
        sampling: temperature, top_k, top_p, banned.
        chance: float64 [n] in 0 ≤ u < 1: where in the cumulative distribution the token lies.
    """
    open_logits = logits
    if sampling.banned:
        banned = torch.tensor(sampling.banned, device=logits.device)
        open_logits = logits.index_fill(1, banned, float("-inf"))
    if sampling.temperature == 0:
        tokens = open_logits.argmax(-1)
        logprobs = _logprobs(logits, tokens)
        return Drawn(tokens, logprobs, logprobs, torch.zeros_like(logprobs))
    tokens, sampled = _inverse(*_candidates(open_logits / sampling.temperature, sampling), chance)
    logprobs = _logprobs(logits, tokens)
    policy = logprobs if sampling.temperature == 1 else _logprobs(logits / sampling.temperature, tokens)
    return Drawn(tokens, logprobs, policy, sampled)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of the tokens, float32 [n], in the operations of ``megavlm.model.token_logprobs``, so that bits agree."""
    top = logits.max(-1).values
    log_sum = top + (logits - top[:, None]).exp_().sum(-1).log()
    return logits.gather(1, tokens[:, None]).squeeze(1) - log_sum


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Returns the weights of the tokens that may be drawn, float64 [n, m], and these tokens; None: token i is at i.

    The weights are proportional to probabilities. They are 0 for tokens that the filters leave out.
    """
    size = logits.shape[1]
    weights_of = lambda values: (values - logits.max(-1, keepdim=True).values).double().exp_()
    if sampling.top_k == 0 and sampling.top_p == 1:
        return weights_of(logits), None
    whole = None if sampling.top_k else weights_of(logits).sum(-1)
    width = min(sampling.top_k or _FIRST_CANDIDATES, size)
    while True:  # top_p alone may keep any number of tokens, but seldom needs all of them sorted
        values, tokens = logits.topk(width)
        weights = weights_of(values)
        upto = weights.cumsum(-1)
        enough = sampling.top_p * (upto[:, -1] if whole is None else whole)
        if whole is None or width == size or bool((upto[:, -1] >= enough).all()):
            break
        width = min(8 * width, size)
    # a token is kept if the sum of those before it is less than top_p; the first is always kept
    return weights.masked_fill_(upto - weights >= enough[:, None], 0.0), tokens


def _inverse(weights: Tensor, tokens: Tensor | None, chance: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at which the cumulative distribution passes ``chance``, and the logarithms of their probabilities."""
    upto = weights.cumsum(-1)
    whole = upto[:, -1:]
    # the first place whose cumulative weight exceeds the number; a place without weight exceeds no more than the last
    place = torch.searchsorted(upto, chance[:, None] * whole, right=True).clamp(max=weights.shape[1] - 1)
    sampled = (weights.gather(1, place) / whole).log().float().squeeze(1)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1), sampled
