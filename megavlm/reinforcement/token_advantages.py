"""The advantages of tokens, from the rewards of answers, the values of a critic and the divergence (GAE).

Every rank of the last pipeline stage computes those of its own targets. An answer may be cut over context-parallel
ranks, which therefore put its values together first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.align.losses import gae, kl_estimate
from megavlm.align.sequences import answer_lengths
from megavlm.data.row import IGNORE, Row
from megavlm.platform import device, to_device
from megavlm.reinforcement.policy_objective import Known
from megavlm.runtime.feed import MicroBatch

_LEAST_VARIANCE = 1e-8  # so that equal advantages are not divided by 0


@dataclass(frozen=True)
class AdvantageOptions:
    """What defines the advantages: the sections of the same names in ``align``.

    Attributes:
        discount, gae_lambda: γ and λ.
        kl: weight of the divergence (k1) from the reference model in the reward of each token.
        whiten: whether the advantages of a step are shifted and scaled to mean 0 and variance 1.
    """

    discount: float = 1.0
    gae_lambda: float = 0.95
    kl: float = 0.0
    whiten: bool = True


@dataclass(frozen=True)
class TokenAdvantages:
    """What is known of a row's targets, float32 [slices, m] each, 0 where there is no target.

    Attributes:
        mask: 1 at targets.
        values: the values before the updates.
        advantages: the advantages; ``whitened`` replaces them.
        returns: advantages before that, plus values.
        kl: k1, log π − log π_ref; 0 without a reference.
    """

    mask: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor


def token_advantages(
    values: Tensor, known: Known, micro_batch: MicroBatch, options: AdvantageOptions, context: dist.ProcessGroup
) -> TokenAdvantages:
    """Computes the advantages of a row. The reward of an answer counts at its last target.

    Args:
        values: float32 [slices, m], the values of the row's targets.
        known: the log-probabilities of the row, if the divergence is a part of the rewards.
        micro_batch: the micro-batch of the row.
        options: what defines the advantages.
        context: the context-parallel ranks.
    """
    row, targets = micro_batch.host, micro_batch.targets
    mask = (targets.weights > 0).float()
    kl = torch.zeros_like(values)
    if options.kl:
        assert known.old is not None, "the divergence is computed from the log-probabilities"
        assert known.reference is not None, "of both models"
        kl = kl_estimate("k1", known.old, known.reference) * mask
    lengths = answer_lengths(row).long()
    count, longest = len(lengths), int(lengths.max())
    at = to_device(_places(row, targets.row_index, lengths.numpy(), longest), device())
    table = values.new_zeros(2, count * longest + 1)  # the last entry gets what is no target
    table.index_copy_(1, at.flatten(), torch.stack([values * mask, -options.kl * kl]).flatten(1))
    if context.size() > 1:
        dist.all_reduce(table, group=context)
    known_values, rewards = table[:, :-1].view(2, count, longest)
    there = to_device(torch.arange(longest) < lengths[:, None], device())
    is_last = to_device(torch.arange(longest) == lengths[:, None] - 1, device())
    of_answers = torch.tensor([a.sampled.advantage if a.sampled else 0.0 for a in row.annotations])
    rewards = rewards + is_last * to_device(of_answers, device())[:, None]
    found = gae(rewards, known_values, there, options.discount, options.gae_lambda)
    advantages, returns = (torch.nn.functional.pad(one.flatten(), (0, 1))[at] * mask for one in found)
    return TokenAdvantages(mask, values * mask, advantages, returns, kl)


def _places(row: Row, positions: Tensor, lengths: np.ndarray, longest: int) -> Tensor:
    """int64 like ``positions``: where each target stands in a table [samples, longest]; its size for no target (-1)."""
    number = np.cumsum((row.labels != IGNORE).numpy()) - 1  # of each target among all of the row
    first = np.cumsum(lengths) - lengths
    sample = np.repeat(np.arange(len(lengths)), lengths)  # of each target
    place = sample * longest + np.arange(len(sample)) - first[sample]
    if not len(place):
        return torch.full_like(positions, len(lengths) * longest)
    found = torch.from_numpy(place)[torch.from_numpy(number)[positions.clamp(min=0)].clamp(min=0)]
    return torch.where(positions >= 0, found, len(lengths) * longest)


def totals(rows: Sequence[TokenAdvantages]) -> Tensor:
    """float64 [6] on the device: sums over the targets of all ranks. Call it on all ranks, of all pipeline stages.

    They are the number of targets, the advantages and their squares, the returns and their squares, and the divergence.
    Tensor-parallel ranks have the same targets, so all of them are multiplied by the same number.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=device())
    for row in rows:
        advantages, returns = row.advantages.double(), row.returns.double()
        values = (row.mask, advantages, advantages.square(), returns, returns.square(), row.kl)
        sums += torch.stack([value.sum(dtype=torch.float64) for value in values])
    dist.all_reduce(sums)
    return sums


def whitened(row: TokenAdvantages, sums: Tensor) -> Tensor:
    """The advantages of a row with mean 0 and variance 1 over the targets of all ranks, from ``totals``."""
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    variance = (sums[2] / count - mean.square()).clamp(min=0)
    return ((row.advantages.double() - mean) * (variance + _LEAST_VARIANCE).rsqrt()).float() * row.mask


def fields_of(sums: Sequence[float], *, has_kl: bool) -> dict[str, float | None]:
    """Fields of metrics.jsonl from ``totals`` on the host.

    The explained variance is 1 − Var(R − V) / Var(R), where R − V are the advantages before whitening.
    """
    count, advantages, squares, returns, return_squares, kl = sums
    if not count:
        return {"returns": None, "explained_variance": None, **({"kl": None} if has_kl else {})}
    of_returns = return_squares / count - (returns / count) ** 2
    of_errors = squares / count - (advantages / count) ** 2
    return {
        "returns": returns / count,
        "explained_variance": 1 - of_errors / of_returns if of_returns > 0 else None,
        **({"kl": kl / count} if has_kl else {}),
    }
