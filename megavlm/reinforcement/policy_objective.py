"""The objective of reinforcement learning: a policy loss over sampled answers that are packed into rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.align.losses import POLICY_LOSSES, correction
from megavlm.align.losses.policy import token_losses
from megavlm.align.losses.reductions import REDUCTIONS
from megavlm.align.sequences import answer_lengths
from megavlm.data.row import IGNORE, Row
from megavlm.model.language import LanguageModel
from megavlm.platform import device, to_device
from megavlm.runtime.feed import MicroBatch
from megavlm.training.objective import LookThrough


@dataclass(frozen=True)
class PolicyOptions:
    """What defines a policy loss.

    Attributes:
        loss: a key of ``POLICY_LOSSES``.
        options: options of that loss.
        beta: weight of the divergence from the reference model; 0: there is none.
        max_length: the constant length by which dr_grpo divides.
        temperature: the temperature at which answers are sampled and log-probabilities compared.
        correction: "off", or a key of ``CORRECTIONS``.
        limits: ``lowest`` and ``highest`` of the correction; absent ones have their defaults.
    """

    loss: str
    beta: float
    max_length: int
    temperature: float = 1.0
    options: dict[str, float] = field(default_factory=dict)
    correction: str = "off"
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What is computed of a row's targets before the updates, float32 [slices, m]; None if it is not needed.

    Attributes:
        old: log-probabilities under the weights before the first update.
        reference: log-probabilities under the reference model.
        advantages: the advantage of each target; None: all targets of an answer have that of the answer.
    """

    old: Tensor | None = None
    reference: Tensor | None = None
    advantages: Tensor | None = None


class PolicyObjective:
    """A policy loss, divided by its count over the whole mini-batch of answers.

    Args:
        options: the loss.
        chunk_tokens: number of targets whose logits are computed at a time.
        groups: the decoder's process groups.

    Attributes:
        known: for each row of the next update, what was computed before; [] if nothing is needed.
    """

    sum_names = ("ratio_mean", "clip_share", "kl", "entropy", "mismatch_kl", "corrected_share")
    max_names = ("ratio_max", "mismatch_max")

    def __init__(self, options: PolicyOptions, chunk_tokens: int, groups: ProcessGroupCollection):
        self.options, self.chunk_tokens, self.context = options, chunk_tokens, groups.cp
        self.reduction = REDUCTIONS[POLICY_LOSSES[options.loss].reduction]
        self.known: Sequence[Known] = []
        self._largest = torch.zeros(len(self.max_names), device=device())

    @property
    def num_sums(self) -> int:
        return 1 + len(self.sum_names)

    def weight(self, rows: list[Row]) -> float:
        """The count of the answers in ``rows``. The samples that fill a rank without answers are not counted."""
        lengths = [n for row in rows for n, a in zip(answer_lengths(row), row.annotations, strict=True) if a.sampled]
        return self.reduction.count(torch.stack(lengths)).item() if lengths else 0.0

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        self._largest.zero_()  # the memory check leaves some, because nobody asks for the fields of its loss
        return self.known

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes log-probabilities and entropies of the targets, [2, slices, m]."""
        logprobs, entropies = chunk.token_logprobs(
            hidden, micro_batch.targets, self.chunk_tokens, entropy=True, temperature=self.options.temperature
        )
        return torch.stack([logprobs, cast(Tensor, entropies)])

    def logprobs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes the log-probabilities of the targets, [slices, m], for a pass without gradients."""
        temperature = self.options.temperature
        return chunk.token_logprobs(hidden, micro_batch.targets, self.chunk_tokens, temperature=temperature)[0]

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        options, answers = self.options, _Answers(micro_batch, self.context)
        logprobs, entropies = outputs.unbind()
        known = cast(Known, micro_batch.found) if micro_batch.found is not None else Known()
        old, reference = known.old, known.reference
        # With a single update, the weights before it are the present ones. Those that have sampled may be older
        # (``rollout.ahead``); that difference is the correction's alone.
        old, mask = logprobs.detach() if old is None else old, answers.mask
        if options.beta and reference is None:  # the memory check and the dry run, which compute nothing beforehand
            reference = logprobs.detach()
        weights, differences = correction(
            options.correction, old, answers.sampled, mask, answer_sum=answers.sum, **options.limits
        )
        losses, ratio, limited, divergence = token_losses(
            options.loss,
            logprobs,
            old,
            answers.advantages if known.advantages is None else known.advantages,
            mask,
            reference,
            beta=options.beta,
            weights=weights,
            answer_mean=answers.mean,
            **options.options,
        )
        loss = (losses * self.reduction.weights(mask, answers.lengths, options.max_length)).sum()
        count = mask.sum()
        sums = {
            "ratio_mean": (ratio * mask).sum(),
            "clip_share": (limited * mask).sum(),
            "kl": torch.zeros_like(count) if divergence is None else (divergence * mask).sum(),
            "entropy": (entropies * mask).sum(),
            "mismatch_kl": differences["mismatch_kl"] * count,
            "corrected_share": differences["corrected_share"] * count,
        }
        if mask.numel():
            largest = torch.stack([(ratio * mask).max(), differences["mismatch_max"]])
            self._largest = torch.maximum(self._largest, largest)
        return loss, torch.stack([loss, *(sums[name] for name in self.sum_names)]).detach()

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        """Means over the targets, and the largest values of all ranks. Call it on all ranks."""
        largest = self._largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tokens = counts["target_tokens"]
        means = {
            name: total / tokens if tokens and (name != "kl" or self.options.beta) else None
            for name, total in zip(self.sum_names, sums[1:], strict=True)
        }
        return means | dict(zip(self.max_names, largest.tolist(), strict=True))


class _Answers:
    """What is known of the targets of a row beside their log-probabilities, [slices, m] like ``Targets``.

    Attributes:
        mask: 1 at targets, 0 at filling.
        advantages: the advantage of each target's answer.
        sampled: the log-probability with which each target was sampled.
        lengths: the number of targets of each target's answer, on all context-parallel ranks.
    """

    def __init__(self, micro_batch: MicroBatch, context: dist.ProcessGroup):
        row, targets = micro_batch.host, micro_batch.targets
        self._samples, self._context, self._count = micro_batch.target_samples, context, row.num_samples
        self.mask = (targets.weights > 0).float()
        advantages = torch.tensor([a.sampled.advantage if a.sampled else 0.0 for a in row.annotations])
        self.advantages = to_device(advantages, device())[self._samples]
        self._lengths = to_device(answer_lengths(row), device())
        self.lengths = self._lengths[self._samples]
        sampled = torch.zeros(len(row.labels))
        sampled[row.labels != IGNORE] = _sampled_logprobs(row)
        self.sampled = to_device(sampled[targets.row_index.clamp(min=0)], device())

    def sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """The sum of ``values`` over the targets of each answer, at all of its targets, without gradient."""
        sums = values.new_zeros(self._count).index_add(0, self._samples.flatten(), (values * mask).detach().flatten())
        if self._context.size() > 1:
            dist.all_reduce(sums, group=self._context)
        return sums[self._samples]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean of ``values`` over the targets of each answer, at all of its targets, without gradient."""
        return self.sum(values, mask) / self.lengths.clamp(min=1)


def _sampled_logprobs(row: Row) -> Tensor:
    """The log-probabilities with which the targets of a row were sampled, float32 [targets]."""
    lengths = answer_lengths(row).int().tolist()
    known = [a.sampled.logprobs for a, n in zip(row.annotations, lengths, strict=True) if a.sampled is not None and n]
    return torch.cat([torch.empty(0), *known])
