"""What rows depend on besides the files: lengths and numbers of rows that change, epochs, and weights of samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megavlm.config.data_sections import DataSettings
from megavlm.config.schedule_section import value_at
from megavlm.config.train_section import TrainSettings
from megavlm.data.draft import Draft


@dataclass(frozen=True)
class RowPlan:
    """A plan of all rows of a run. Rows of all data ranks have numbers from 0, steps have numbers from 1.

    Attributes:
        per: how much a sample counts, ``train.loss.per``.
        epochs: number of passes over the data after which there are no further samples; None: there is no end.
        rows: number of rows in a step over all data ranks, behind the last entry of ``batch_ramp``.
        batch_ramp: {last step: number of rows in a step}.
        length_ramp: {last step: tokens of a row}.
    """

    per: Literal["token", "sample", "sqrt"] = "token"
    epochs: float | None = None
    rows: int = 1
    batch_ramp: Mapping[int, int] = field(default_factory=dict)
    length_ramp: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, train: TrainSettings, data: DataSettings) -> "RowPlan":
        """The plan of a run with these sections."""
        return cls(train.loss.per, train.epochs, train.global_batch_size or 1, train.batch_ramp, data.length_ramp)

    def place(self, row: int) -> tuple[int, int]:
        """The step that a row belongs to, and its number in this step, from 0."""
        steps = 0
        for last, rows in sorted(self.batch_ramp.items()):
            if row < (last - steps) * rows:
                return steps + row // rows + 1, row % rows
            row, steps = row - (last - steps) * rows, last
        return steps + row // self.rows + 1, row % self.rows

    def first_row(self, step: int) -> int:
        """The first row of a step."""
        first, steps = 0, 0
        for last, rows in sorted(self.batch_ramp.items()):
            if step <= last:
                return first + (step - 1 - steps) * rows
            first, steps = first + (last - steps) * rows, last
        return first + (step - 1 - steps) * self.rows

    def length(self, row: int, longest: int) -> int:
        """The number of tokens of a row; ``longest`` is that of rows behind the last entry of ``length_ramp``."""
        return value_at(self.length_ramp, self.place(row)[0], longest) if self.length_ramp else longest

    def weigh(self, draft: Draft, loss_weight: float) -> None:
        """Multiplies the weights of a draft's targets by the weight of its source and by what ``per`` asks for."""
        count = max(int(np.count_nonzero(draft.weights[1:])), 1)  # the first token is no target of any other
        factor = loss_weight * {"token": 1.0, "sample": 1 / count, "sqrt": count**-0.5}[self.per]
        if factor != 1.0:
            draft.weights = draft.weights * np.float32(factor)
