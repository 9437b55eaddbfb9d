"""The objectives of dpo, kto and rm, which apply the losses of ``align.losses`` to the answers of packed rows."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.align.losses import PREFERENCE_LOSSES, kto_loss, preference_loss, reward_loss
from megavlm.align.sequences import answer_lengths, answer_logprobs, sum_of_ranks
from megavlm.data.row import Row
from megavlm.model.language import LanguageModel
from megavlm.platform import device, to_device
from megavlm.runtime.feed import MicroBatch
from megavlm.training.objective import LookThrough
from megavlm.training.start_weights import StartWeights


class _AnswerObjective:
    """Base class of objectives over whole answers. ``names`` are the names of its sums after that of the loss."""

    names: tuple[str, ...]

    def __init__(self, chunk_tokens: int, groups: ProcessGroupCollection, start: StartWeights | None):
        self.chunk_tokens, self.groups, self.context, self.start = chunk_tokens, groups, groups.cp, start

    @property
    def num_sums(self) -> int:
        return 1 + len(self.names)

    def look_ahead(self, look_through: LookThrough) -> Sequence[Any]:
        """If a reference model is run in each step, returns its log-probabilities of each row's answers.

        They are float32 [samples] for each row.
        """
        if self.start is None:
            return []
        with self.start():
            return look_through(self._answers_of)

    def references(self, row: Row, found: Tensor | None) -> Tensor:
        """Returns the reference model's log-probability of each answer, float32 [samples] on the device.

        Args:
            row: the row, whose annotations have log-probabilities from the reference file.
            found: the result of ``look_ahead``, if the reference model is run in each step; otherwise None.
        """
        if found is not None:
            return found
        stored = [answer.ref_logprob for answer in row.annotations]
        return to_device(torch.tensor(stored, dtype=torch.float32), device())

    def _answers_of(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        return self.answers(self.outputs(chunk, hidden, micro_batch), micro_batch)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        return chunk.token_logprobs(hidden, micro_batch.targets, self.chunk_tokens)[0]

    def answers(self, outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Returns the summed log-probability of each answer, float32 [samples]."""
        return answer_logprobs(outputs, micro_batch, self.context)

    def sums(self, loss: Tensor, values: list[Tensor]) -> Tensor:
        """Returns the vector that is summed over ranks, divided by the context-parallel ranks, which all compute it."""
        return torch.stack([loss, *values]).detach() / self.context.size()


class PairObjective(_AnswerObjective):
    """A preference loss, averaged over the pairs of the global batch.

    Each rejected answer of a row makes a pair with the chosen answer before it. The chosen answer's negative
    log-likelihood, a mean over its tokens, may be added: with weight 1 for orpo, and with ``sft_weight``. (TRL's loss
    ``sft`` is a mean over the tokens of all chosen answers of a micro-batch, which depends on how a batch is cut.)

    Args:
        loss: a key of ``PREFERENCE_LOSSES``.
        options: options of that loss.
        chunk_tokens: number of targets whose logits are computed at a time.
        groups: the decoder's process groups.
        start: the reference model, if it is run in each step.
        sft_weight: weight of the chosen answer's negative log-likelihood.
    """

    names: tuple[str, ...] = (
        *("rewards/chosen", "rewards/rejected", "accuracy", "margin"),
        *("logprobs/chosen", "logprobs/rejected"),
    )

    def __init__(
        self,
        loss: str,
        options: dict[str, float],
        chunk_tokens: int,
        groups: ProcessGroupCollection,
        start: StartWeights | None = None,
        sft_weight: float = 0.0,
    ):
        super().__init__(chunk_tokens, groups, start)
        self.name, self.options, self.has_reference = loss, options, PREFERENCE_LOSSES[loss].reference
        self.sft_weight = 1.0 if loss == "orpo" else sft_weight
        if sft_weight:
            self.names = (*self.names, "nll/chosen")

    def weight(self, rows: list[Row]) -> float:
        return sum(len(pairs_of(row)) for row in rows)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        row = micro_batch.host
        places = pairs_of(row)
        answers, pairs = self.answers(outputs, micro_batch), to_device(places, device())
        shares = to_device(places[:, 0].bincount()[places[:, 0]].float(), device())
        lengths = to_device(answer_lengths(row), device())
        ref_chosen = ref_rejected = None
        if self.has_reference:
            found = cast(Tensor | None, micro_batch.found)  # from look_ahead
            ref_chosen, ref_rejected = self.references(row, found)[pairs].unbind(1)
        (chosen, rejected), (chosen_lengths, rejected_lengths) = answers[pairs].unbind(1), lengths[pairs].unbind(1)
        losses, metrics = preference_loss(
            self.name, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, **self.options
        )
        nll = -chosen / chosen_lengths / shares  # a chosen answer is learned once, also if it has several pairs
        if self.sft_weight:
            losses = losses + self.sft_weight * nll
        loss = losses.sum()
        values = [metrics[name] * len(losses) for name in self.names[:4]]
        return loss, self.sums(loss, [*values, *answers[pairs].sum(dim=0), nll.sum()][: len(self.names)])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        pairs = counts["weight"]
        return {"pairs": int(pairs)} | {
            name: total / max(pairs, 1) for name, total in zip(self.names, sums[1:], strict=True)
        }


class JudgedObjective(_AnswerObjective):
    """The KTO loss, averaged over the judged answers of the global batch.

    Its reference point z0, the model's divergence from the reference model on answers to other prompts, is a mean over
    the global batch. It is computed first, in a forward pass without gradients over the rows of the step.

    Args:
        beta, desirable_weight, undesirable_weight: options of ``kto_loss``.
        chunk_tokens: number of targets whose logits are computed at a time.
        groups: the decoder's process groups.
        start: the reference model, if it is run in each step.
    """

    names = ("sum/desirable", "sum/undesirable", "count/desirable", "count/undesirable", "accuracy", "z0")

    def __init__(
        self,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        chunk_tokens: int,
        groups: ProcessGroupCollection,
        start: StartWeights | None = None,
    ):
        super().__init__(chunk_tokens, groups, start)
        self.options = (beta, desirable_weight, undesirable_weight)

    def weight(self, rows: list[Row]) -> float:
        return sum(answer.desirable is not None for row in rows for answer in row.annotations)

    def look_ahead(self, look_through: LookThrough) -> list[tuple[Tensor, Tensor | None]]:
        """Finds z0 and, for each row, the log-probabilities of ``_AnswerObjective.look_ahead``, or None."""
        references = super().look_ahead(look_through)

        def gaps(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            row = micro_batch.host
            mismatched = _indices([answer.mismatched for answer in row.annotations])
            reference = self.references(row, references[micro_batch.number] if references else None)
            gap = (self._answers_of(chunk, hidden, micro_batch) - reference)[mismatched].sum()
            return torch.stack([gap, gap.new_full((), len(mismatched))])

        totals = torch.zeros(2, device=device())
        of_rows = look_through(gaps)
        if of_rows and self.groups.tp.rank() == 0:
            totals = torch.stack(of_rows).sum(dim=0)
        dist.all_reduce(totals)  # context-parallel ranks multiply both numbers by the same factor
        z0 = (totals[0] / totals[1].clamp(min=1)).clamp(min=0)
        return [(z0, references[number] if references else None) for number in range(len(of_rows))]

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        row, (z0, reference) = micro_batch.host, cast(tuple[Tensor, Tensor | None], micro_batch.found)  # look_ahead
        judged = _indices([answer.desirable is not None for answer in row.annotations])
        desirable = torch.tensor([a.desirable for a in row.annotations if a.desirable is not None])
        answers, references = self.answers(outputs, micro_batch)[judged], self.references(row, reference)[judged]
        losses, metrics = kto_loss(answers, references, to_device(desirable, device()), z0, *self.options)
        loss, count = losses.sum(), len(losses)
        good, bad = metrics["count/desirable"], metrics["count/undesirable"]
        values = [
            metrics["rewards/desirable"] * good,
            metrics["rewards/undesirable"] * bad,
            good.to(loss.dtype),
            bad.to(loss.dtype),
            metrics["accuracy"] * count,
            z0 * count,
        ]
        return loss, self.sums(loss, values)

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        _, desirable, undesirable, good, bad, accuracy, z0 = sums
        rewards = (desirable / good if good else None, undesirable / bad if bad else None)
        return {
            "rewards/desirable": rewards[0],
            "rewards/undesirable": rewards[1],
            "desirable": round(good),
            "undesirable": round(bad),
            "accuracy": accuracy / max(counts["weight"], 1),
            "margin": None if rewards[0] is None or rewards[1] is None else rewards[0] - rewards[1],
            "z0": z0 / max(counts["weight"], 1),
        }


class RewardObjective(_AnswerObjective):
    """The Bradley–Terry loss of a reward model, averaged over the pairs of the global batch.

    Args:
        centering: weight of the term that keeps the scores near 0.
        groups: the decoder's process groups.
        sequence_parallel: whether tensor-parallel ranks have different tokens.
    """

    names = ("accuracy", "margin", "scores/mean", "scores/squares")

    def __init__(self, centering: float, groups: ProcessGroupCollection, *, sequence_parallel: bool):
        super().__init__(0, groups, None)
        self.centering, self.tensor = centering, groups.tp if sequence_parallel else None

    def weight(self, rows: list[Row]) -> float:
        return sum(len(pairs_of(row)) for row in rows)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes the scores of the answers, float32 [samples], the same on all ranks."""
        scores = chunk.scores(hidden, micro_batch.last_targets)
        if self.tensor is not None:
            scores = sum_of_ranks(scores, self.tensor)
        return sum_of_ranks(scores, self.context)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        row, pairs = micro_batch.host, pairs_of(micro_batch.host)
        margin = to_device(torch.tensor([row.annotations[first].margin for first in pairs[:, 0].tolist()]), device())
        answers = outputs[to_device(pairs, device())]
        chosen, rejected = answers.unbind(1)
        losses, metrics = reward_loss(chosen, rejected, margin, self.centering)
        loss, count = losses.sum(), len(losses)
        squares = answers.square().sum() / 2
        return loss, self.sums(loss, [*(metrics[name] * count for name in self.names[:3]), squares])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        pairs = max(counts["weight"], 1)
        accuracy, margin, mean, squares = (total / pairs for total in sums[1:])
        return {
            "pairs": int(counts["weight"]),
            "accuracy": accuracy,
            "margin": margin,
            "scores/mean": mean,
            "scores/std": max(squares - mean**2, 0.0) ** 0.5,
        }


def pairs_of(row: Row) -> Tensor:
    """Returns the places of the chosen and the rejected answer of each pair in a row, int64 [pairs, 2] on the host."""
    pairs, chosen = [], 0
    for place, answer in enumerate(row.annotations):
        if answer.side == "rejected":
            pairs.append((chosen, place))
        else:
            chosen = place
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _indices(flags: list[bool]) -> Tensor:
    """Returns the indices of the n true flags, int64 [n] on the device."""
    return to_device(torch.tensor(flags, dtype=torch.bool).nonzero()[:, 0], device())
