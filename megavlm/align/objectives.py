"""What dpo, kto and rm minimise: the pure losses of ``megavlm.align.losses`` over the answers of packed rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.align.losses import PREFERENCE_LOSSES, kto_loss, preference_loss, reward_loss
from megavlm.align.sequences import answer_lengths, answer_logprobs, sum_of_ranks
from megavlm.data.row import Row
from megavlm.model.language import LanguageModel
from megavlm.platform import device, to_device
from megavlm.runtime.feed import MicroBatch, StepRows
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step


class _AnswerObjective:
    """What losses of whole answers share. ``names``: of the metrics, which are means over ``weight``."""

    names: tuple[str, ...]

    def __init__(self, chunk_tokens: int, context: dist.ProcessGroup):
        self.chunk_tokens, self.context = chunk_tokens, context
        self.start: StartWeights | None = None  # set where the reference is worked out in the step
        self._references: dict[int, Tensor] = {}

    @property
    def num_sums(self) -> int:
        return 1 + len(self.names)

    def look_ahead(self, step: Step, rows: StepRows) -> None:
        if self.start is not None:
            with self.start():
                self._references = {id(row): found for row, found in step.look_through(rows, self._answers_of)}

    def references(self, row: Row) -> Tensor:
        """float32 [samples] on the device: the reference's log-probability of each answer."""
        if self.start is not None:
            return self._references[id(row)]
        return to_device(
            torch.tensor([annotations["ref"] for annotations in row.annotations], dtype=torch.float32), device()
        )

    def _answers_of(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        return self.answers(self.outputs(chunk, hidden, micro_batch), micro_batch)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        return chunk.token_logprobs(hidden, micro_batch.targets, self.chunk_tokens)[0]

    def answers(self, outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
        """float32 [samples], summed log-probabilities."""
        return answer_logprobs(outputs, micro_batch, self.context)

    def sums(self, loss: Tensor, values: list[Tensor]) -> Tensor:
        """The vector that is added up over ranks; context ranks have each worked out all of it."""
        return torch.stack([loss, *values]).detach() / self.context.size()


class PairObjective(_AnswerObjective):
    """A loss of pairs, averaged over the pairs of the global batch; with orpo the chosen answer's NLL is added.

    The samples of a row are chosen and rejected answers in turn.

    Args:
        loss: a key of ``PREFERENCE_LOSSES``. options: of that loss.
        chunk_tokens: targets whose logits exist at one time. context: context-parallel ranks.
    """

    names = ("rewards/chosen", "rewards/rejected", "accuracy", "margin", "logprobs/chosen", "logprobs/rejected")

    def __init__(self, loss: str, options: dict, chunk_tokens: int, context: dist.ProcessGroup):
        super().__init__(chunk_tokens, context)
        self.name, self.options, self.has_reference = loss, options, PREFERENCE_LOSSES[loss].reference

    def weight(self, rows: list[Row]) -> float:
        return sum(row.num_samples // 2 for row in rows)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        row = micro_batch.host
        answers = self.answers(outputs, micro_batch).view(-1, 2)
        lengths = to_device(answer_lengths(row), device()).view(-1, 2)
        references = None, None
        if self.has_reference:
            references = self.references(row).view(-1, 2).unbind(1)
        losses, metrics = preference_loss(
            self.name, *answers.unbind(1), *references, *lengths.unbind(1), **self.options
        )
        if self.name == "orpo":
            losses = losses - answers[:, 0] / lengths[:, 0]
        loss = losses.sum()
        values = [metrics[name] * len(losses) for name in self.names[:4]]
        return loss, self.sums(loss, [*values, *answers.sum(dim=0)])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        pairs = counts["weight"]
        return {"pairs": int(pairs)} | {
            name: total / max(pairs, 1) for name, total in zip(self.names, sums[1:], strict=True)
        }


class JudgedObjective(_AnswerObjective):
    """KTO, averaged over the judged answers of the global batch.

    Its point of comparison z0, the policy's divergence from the reference on answers to other prompts, is a mean over
    the global batch: a pass without gradient over the step's rows finds it first.

    Args:
        beta, desirable_weight, undesirable_weight: of ``kto_loss``.
        chunk_tokens: targets whose logits exist at one time. context: context-parallel ranks.
    """

    names = ("sum/desirable", "sum/undesirable", "count/desirable", "count/undesirable", "accuracy", "z0")
    has_reference = True

    def __init__(
        self,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        chunk_tokens: int,
        context: dist.ProcessGroup,
    ):
        super().__init__(chunk_tokens, context)
        self.options = (beta, desirable_weight, undesirable_weight)
        self.z0 = torch.zeros((), device=device())

    def weight(self, rows: list[Row]) -> float:
        return sum("desirable" in annotations for row in rows for annotations in row.annotations)

    def look_ahead(self, step: Step, rows: StepRows) -> None:
        super().look_ahead(step, rows)

        def gaps(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            row = micro_batch.host
            places = _places(row, "mismatched")
            gap = (self._answers_of(chunk, hidden, micro_batch) - self.references(row))[places].sum()
            return torch.stack([gap, gap.new_full((), len(places))])

        totals = torch.zeros(2, device=device())
        found = step.look_through(rows, gaps)
        if found and step.groups.language.tp.rank() == 0:
            totals = torch.stack([gap for _, gap in found]).sum(dim=0)
        dist.all_reduce(totals)  # context ranks add the same to both numbers
        self.z0 = (totals[0] / totals[1].clamp(min=1)).clamp(min=0)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        row = micro_batch.host
        places = _places(row, "desirable")
        desirable = torch.tensor(
            [annotations["desirable"] for annotations in row.annotations if "desirable" in annotations]
        )
        answers, references = self.answers(outputs, micro_batch)[places], self.references(row)[places]
        losses, metrics = kto_loss(answers, references, to_device(desirable, device()), self.z0, *self.options)
        loss, count = losses.sum(), len(losses)
        good, bad = metrics["count/desirable"], metrics["count/undesirable"]
        values = [
            metrics["rewards/desirable"] * good,
            metrics["rewards/undesirable"] * bad,
            good.to(loss.dtype),
            bad.to(loss.dtype),
            metrics["accuracy"] * count,
            self.z0 * count,
        ]
        return loss, self.sums(loss, values)

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        _, desirable, undesirable, good, bad, accuracy, z0 = sums
        return {
            "rewards/desirable": desirable / good if good else None,
            "rewards/undesirable": undesirable / bad if bad else None,
            "desirable": round(good),
            "undesirable": round(bad),
            "accuracy": accuracy / max(counts["weight"], 1),
            "z0": z0 / max(counts["weight"], 1),
        }


class RewardObjective(_AnswerObjective):
    """Bradley–Terry on the scores of pairs, averaged over the pairs of the global batch.

    Args:
        centering: weight of the pull of scores to 0.
        groups: the decoder's process groups. sequence_parallel: whether tensor ranks hold different tokens.
    """

    names = ("accuracy", "margin", "scores/mean", "scores/squares")
    has_reference = False

    def __init__(self, centering: float, groups, *, sequence_parallel: bool):
        super().__init__(0, groups.cp)
        self.centering, self.tensor = centering, groups.tp if sequence_parallel else None

    def weight(self, rows: list[Row]) -> float:
        return sum(row.num_samples // 2 for row in rows)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """float32 [samples], the same on all ranks."""
        scores = chunk.scores(hidden, micro_batch.last_targets)
        if self.tensor is not None:
            scores = sum_of_ranks(scores, self.tensor)
        return sum_of_ranks(scores, self.context)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        annotations = micro_batch.host.annotations[::2]
        margin = to_device(torch.tensor([fact["margin"] for fact in annotations]), device())
        chosen, rejected = outputs.view(-1, 2).unbind(1)
        losses, metrics = reward_loss(chosen, rejected, margin, self.centering)
        loss, count = losses.sum(), len(losses)
        squares = outputs.square().sum() / 2
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


def _places(row: Row, fact: str) -> Tensor:
    """int64 [n] on the device: places of the samples that have ``fact``."""
    places = [place for place, annotations in enumerate(row.annotations) if fact in annotations]
    return to_device(torch.tensor(places, dtype=torch.int64), device())
