"""The objective of a critic: values of the tokens of sampled answers, and their squared error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.align.losses.value import value_losses
from megavlm.align.sequences import sum_of_ranks
from megavlm.data.row import IGNORE, Row
from megavlm.model.language import LanguageModel
from megavlm.runtime.feed import MicroBatch
from megavlm.training.objective import LookThrough


@dataclass(frozen=True)
class KnownValues:
    """What is computed of a row's targets before the updates, float32 [slices, m] each.

    Attributes:
        values: the values.
        returns: what they should be.
    """

    values: Tensor
    returns: Tensor


class ValueObjective:
    """The clipped squared error of the values, averaged over the target tokens of the whole mini-batch.

    The value of a target is that of the state before it: the score of the position that predicts it.

    Args:
        clip: how far a value may move from its old one; None: as far as it will.
        groups: the decoder's process groups.
        sequence_parallel: whether tensor-parallel ranks have different tokens.

    Attributes:
        known: for each row of the next update, what was computed before.
    """

    def __init__(self, clip: float | None, groups: ProcessGroupCollection, *, sequence_parallel: bool):
        self._clip, self._tensor = clip, groups.tp if sequence_parallel else None
        self.known: Sequence[KnownValues] = []

    @property
    def num_sums(self) -> int:
        return 2

    def weight(self, rows: list[Row]) -> float:
        """The number of target tokens."""
        return float(sum(int((row.labels != IGNORE).sum()) for row in rows))

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        return self.known

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes the values of the targets, float32 [slices, m], the same on all tensor-parallel ranks."""
        targets = micro_batch.targets
        values = chunk.score_head(hidden.squeeze(1).index_select(0, targets.local))[None]
        if self._tensor is None:
            return values
        count, index = targets.tokens.shape[0], self._tensor.rank()
        return sum_of_ranks(torch.nn.functional.pad(values, (0, 0, index, count - 1 - index)), self._tensor)

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        known = cast(KnownValues | None, micro_batch.found)
        if known is None:  # the memory check and the dry run, which compute nothing beforehand
            known = KnownValues(outputs.detach(), torch.zeros_like(outputs))
        mask = (micro_batch.targets.weights > 0).float()
        losses, limited = value_losses(outputs, known.values, known.returns, clip=self._clip)
        loss = (losses * mask).sum()
        return loss, torch.stack([loss.detach(), (limited * mask).sum()])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        tokens = counts["target_tokens"]
        return {"value_clip_share": sums[1] / tokens if tokens else None}
