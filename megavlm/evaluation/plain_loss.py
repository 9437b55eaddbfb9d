"""The loss of held-out targets: what `megavlm score` gives, whatever the training loss adds to it."""

from collections.abc import Sequence

from torch import Tensor

from megavlm.data.row import Row
from megavlm.model.language import LanguageModel
from megavlm.runtime.feed import MicroBatch
from megavlm.training.objective import LookThrough


class PlainLoss:
    """The mean negative log-probability of the targets, with the weights of their messages; see ``Objective``.

    Args:
        chunk_tokens: number of targets whose logits are computed at a time.
    """

    num_sums = 1

    def __init__(self, chunk_tokens: int):
        self.chunk_tokens = chunk_tokens

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        """Nothing must be known beforehand."""
        return []

    def weight(self, rows: list[Row]) -> float:
        """The sum of the targets' weights."""
        return sum(row.loss_weights.double().sum().item() for row in rows)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """The log-probabilities of the targets, [slices, m] like ``Targets``."""
        return chunk.token_logprobs(hidden, micro_batch.targets, self.chunk_tokens)[0]

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The loss of a row, twice: as a scalar and as its only sum, float64."""
        nll = -(outputs.double() * micro_batch.targets.weights).sum()
        return nll, nll[None]

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        """No further fields."""
        return {}
