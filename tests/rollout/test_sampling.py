"""Tokens follow the distribution that the filters leave, and are a function of seed, index and distribution alone."""

import math

import pytest
import torch

from megavlm.rollout.engine import Sampling
from megavlm.rollout.sampling import draw, mixed_seed, uniforms

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.1])
DRAWS = 10_000


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Σ (counts - expected)² / expected over the outcomes that can occur; the others must not."""
    assert not counts[expected == 0].any()
    possible = expected > 0
    return ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum().item()


FILTERS = {
    "temperature": ({"temperature": 2.0, "banned": (2, 3)}, [math.sqrt(2), 1, 0, 0]),
    "top_k": ({"top_k": 2}, [2, 1, 0, 0]),
    "top_p": ({"top_p": 0.7}, [2, 1, 0, 0]),
    "top_p at its edge": ({"top_p": 0.4999}, [1, 0, 0, 0]),
    # after top_k, the first token has 4/6 ≥ 0.6 of what is left, so that top_p keeps no other
    "top_k, then top_p": ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    "banned": ({"banned": (0, 3)}, [0, 5, 3, 0]),
    "banned and top_k": ({"banned": (0,), "top_k": 2}, [0, 5, 3, 0]),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vary", ["seeds", "indices"])
def test_draws_follow_the_distribution(name, vary):
    options, weights = FILTERS[name]
    numbers, zeros = range(DRAWS), [0] * DRAWS
    chance = uniforms(numbers, zeros) if vary == "seeds" else uniforms(zeros, numbers)
    sampling = Sampling(1, **{"temperature": 1.0, **options})
    drawn = draw(PROBABILITIES.log().repeat(DRAWS, 1), sampling, chance)
    shares = torch.tensor(weights) / sum(weights)
    # with one degree of freedom 0.1 % of all seeds give more than 10.8; these seeds are fixed
    assert chi_square(torch.bincount(drawn.tokens, minlength=4), shares * DRAWS) < 10.8
    torch.testing.assert_close(drawn.sampled_logprobs, shares.log()[drawn.tokens])
    torch.testing.assert_close(drawn.logprobs, PROBABILITIES.log()[drawn.tokens])
    heated = PROBABILITIES.log().div(sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(drawn.policy_logprobs, heated[drawn.tokens])


def test_uniform_numbers_are_uniform_and_unrelated():
    for chance in (uniforms(range(DRAWS), [7] * DRAWS), uniforms([7] * DRAWS, range(DRAWS))):
        bins = (chance * 20).long()
        # 0.1 % points of chi-square with 19 and 399 degrees of freedom
        assert chi_square(torch.bincount(bins, minlength=20), torch.full((20,), DRAWS / 20)) < 43.8
        pairs = bins[:-1] * 20 + bins[1:]
        assert chi_square(torch.bincount(pairs, minlength=400), torch.full((400,), (DRAWS - 1) / 400)) < 490


def test_a_token_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator)
    seeds = [mixed_seed(1, n) for n in range(50)]
    for options in ({}, {"top_k": 20}, {"top_p": 0.8}):
        sampling = Sampling(1, temperature=0.9, **options)
        together = draw(logits, sampling, uniforms(seeds, [3] * 50)).tokens
        alone = [draw(logits[n : n + 1], sampling, uniforms([seeds[n]], [3])).tokens.item() for n in range(50)]
        assert together.tolist() == alone
        assert together.tolist() != draw(logits, sampling, uniforms(seeds, [4] * 50)).tokens.tolist()
    assert len(set(seeds)) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2) != mixed_seed(2, 1)


def test_top_p_may_keep_more_tokens_than_are_sorted_at_first():
    logits = torch.arange(5000).float() * -1e-6  # almost even, and ordered: 0.8 of the sum are the first 4,000
    drawn = draw(logits.repeat(200, 1), Sampling(1, temperature=1.0, top_p=0.8), uniforms(range(200), [0] * 200))
    assert 3000 < drawn.tokens.max() <= 4000
    assert torch.allclose(drawn.sampled_logprobs, torch.tensor(-math.log(4000)), atol=0.01)


def test_greedy_takes_the_most_likely_token_that_is_not_banned():
    drawn = draw(PROBABILITIES.log()[None], Sampling(1, banned=(0,)), uniforms([5], [0]))
    assert drawn.tokens.tolist() == [1]
    assert drawn.logprobs.item() == pytest.approx(math.log(0.25))
    assert drawn.policy_logprobs.item() == pytest.approx(math.log(0.25))
    assert drawn.sampled_logprobs.item() == 0
