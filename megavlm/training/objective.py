"""Objectives: they compute a row's part of the loss, and sums for the metrics, from its last hidden states."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from megavlm.config.loss_section import LossSettings
from megavlm.data.row import IGNORE, Row
from megavlm.model.language import LanguageModel
from megavlm.runtime.feed import MicroBatch
from megavlm.training.start_weights import StartWeights

Read = Callable[[LanguageModel, Tensor, MicroBatch], Tensor]
"""Computes a tensor from the last chunk of the decoder, hidden states [t, 1, hidden] and the micro-batch of a row."""
LookThrough = Callable[[Read], list[Tensor]]
"""Computes something for all rows of a step (see ``Objective.look_ahead``)."""


class Objective(Protocol):
    """A loss that is a sum over the rows of the global batch, divided once by the sum of the rows' weights."""

    @property
    def num_sums(self) -> int:
        """Length of the vector of sums; the first of them is the sum of the loss itself."""

    def weight(self, rows: list[Row]) -> float:
        """Returns what these rows add to the number by which the loss is divided."""

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        """Computes what must be known about all rows of the step before the forward pass. It is called on all ranks.

        Args:
            look_through: runs the model on all rows of the step without gradients. It returns the results of its
                argument for each row, in order, on the ranks of the last pipeline stage, and [] on the other ranks.

        Returns:
            One value for each row, which ``outputs`` and ``loss`` find in ``MicroBatch.found``; [] if there is none.
        """

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes the inputs of the loss from the hidden states [t, 1, hidden] of the last pipeline stage."""

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Computes the loss of a row (a scalar) and its sums, float32 [num_sums] without gradient.

        The sums are added over rows and ranks. Context-parallel ranks have the same row and different parts of its
        targets, and what they return is added as well. Their gradients are also added, so a loss of whole sequences is
        computed on each of them.
        """

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        """Returns fields for metrics.jsonl, computed from the sums over the global batch and the step's counts."""


class CrossEntropy:
    """Weighted negative log-probability of the targets, for pretraining and supervised fine-tuning.

    Args:
        source_names: names of the data sources, in the order of their numbers. If there are several, each has a loss of
            its own in the metrics.
        chunk_tokens: number of targets whose logits are computed at a time.
        options: ``train.loss``: a z-loss may be added, and targets may be smoothed.
    """

    def __init__(self, source_names: Sequence[str], chunk_tokens: int, options: LossSettings = LossSettings()):  # noqa: B008 (immutable)
        self.source_names, self.chunk_tokens, self.options = list(source_names), chunk_tokens, options
        self._has_terms = bool(options.z_loss or options.label_smoothing)

    @property
    def num_sums(self) -> int:
        return 1 + len(self.source_names) + 2 * self._has_terms

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        return []

    def weight(self, rows: list[Row]) -> float:
        return sum(row.loss_weights.sum().item() for row in rows)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes the log-probabilities of the targets, [1, slices, m], in the last two dimensions like ``Targets``.

        With a z-loss or smoothing, also log Σ exp(logit) and the mean logit over the vocabulary, [3, slices, m].
        """
        return torch.stack(self._outputs(chunk, hidden, micro_batch))

    def _outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
        found = chunk.token_logprobs(hidden, micro_batch.targets, self.chunk_tokens, sums=self._has_terms)
        return list(found if self._has_terms else found[:1])

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        weights = micro_batch.targets.weights
        each = outputs[0] * weights
        nll = -each.sum()
        sources = micro_batch.sample_sources[micro_batch.target_samples.flatten()]
        of_sources = each.new_zeros(len(self.source_names)).index_add(0, sources, -each.detach().flatten())
        if not self._has_terms:
            return nll, torch.cat([nll.detach()[None], of_sources])
        _, log_z, means = outputs[:3]
        smoothing = self.options.label_smoothing
        z_loss = self.options.z_loss * (log_z.square() * weights).sum()
        # the mean of -log p over the vocabulary is log Σ exp(logit) less the mean logit
        loss = (1 - smoothing) * nll + smoothing * ((log_z - means) * weights).sum() + z_loss
        return loss, torch.cat([torch.stack([loss, nll, z_loss]).detach(), of_sources])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        fields: dict[str, float | None] = {}
        if self._has_terms:
            _, nll, z_loss, *of_sources = sums
            weight = max(counts["weight"], 1e-12)
            fields, sums = {"nll": nll / weight, "z_loss": z_loss / weight}, [nll, *of_sources]
        if len(self.source_names) == 1:
            return fields
        weights = [counts[f"loss_weight/{name}"] for name in self.source_names]
        return fields | {
            f"loss/{name}": total / weight if weight else None
            for name, total, weight in zip(self.source_names, sums[1:], weights, strict=True)
        }


class CrossEntropyWithKL(CrossEntropy):
    """Cross-entropy plus ``coefficient`` times KL(model ‖ start model) at the targets, against forgetting.

    The divergence is over the whole vocabulary and has the same weights as the cross-entropy. A forward pass without
    gradients computes the start model's hidden states first.
    """

    def __init__(self, plain: CrossEntropy, coefficient: float, start: StartWeights):
        super().__init__(plain.source_names, plain.chunk_tokens, plain.options)
        self.coefficient, self.start = coefficient, start

    @property
    def num_sums(self) -> int:
        return 2 + super().num_sums

    def look_ahead(self, look_through: LookThrough) -> Sequence[object]:
        """Computes the start model's hidden states [m, hidden] at the targets of each row."""
        at_targets = lambda chunk, hidden, micro_batch: hidden.squeeze(1).index_select(0, micro_batch.targets.local)
        with self.start():
            return look_through(at_targets)

    def outputs(self, chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Computes what ``CrossEntropy`` does, and the divergences behind it, [2 or 4, slices, m]."""
        weight, states = self.start.of(chunk.output_weight), cast(Tensor, micro_batch.found)  # from look_ahead
        kl = chunk.token_kl(hidden, states, weight, micro_batch.targets, self.chunk_tokens)
        return torch.stack([*self._outputs(chunk, hidden, micro_batch), kl])

    def loss(self, outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        plain, sums = super().loss(outputs, micro_batch)
        kl = (outputs[-1] * micro_batch.targets.weights).sum()
        loss = plain + self.coefficient * kl
        return loss, torch.cat([torch.stack([loss, plain, kl]).detach(), sums[1:]])

    def fields(self, sums: list[float], counts: dict[str, float]) -> dict[str, float | None]:
        _, plain, kl, *others = sums
        weight = max(counts["weight"], 1e-12)
        return {"nll": plain / weight, "kl_to_start": kl / weight, **super().fields([plain, *others], counts)}


def count_sources(rows: list[Row], source_names: Sequence[str]) -> dict[str, float]:
    """Counts samples (answers), targets, loss weights, used-up records and newly read records of each source.

    A record is used up when it is in a row or was skipped; see ``Row.newly_read``.

    Args:
        rows: the rows to count in.
        source_names: names of the sources, in the order of their numbers.
    """
    sums = np.zeros((5, len(source_names)))
    for row in rows:
        starts = row.cu_seqlens[: row.num_samples].numpy()
        values = (
            np.ones(row.num_samples),
            np.add.reduceat((row.labels != IGNORE).numpy(), starts, dtype=np.int64),
            np.add.reduceat(row.loss_weights.numpy(), starts, dtype=np.float64),
            np.array([not annotations.is_further_answer for annotations in row.annotations], dtype=np.float64),
        )
        for of_sources, of_samples in zip(sums, values, strict=False):  # the last of sums is filled below
            np.add.at(of_sources, row.source_ids, of_samples)
        np.add.at(sums[3], [skipped.source_id for skipped in row.skipped_samples], 1)
        sums[4, : len(row.newly_read)] += row.newly_read
    kinds = ("samples", "target_tokens", "loss_weight", "used", "newly_read")
    return {
        f"{kind}/{name}": value
        for kind, values in zip(kinds, sums.tolist(), strict=True)
        for name, value in zip(source_names, values, strict=True)
    }
