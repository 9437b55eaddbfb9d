"""What the method's objective, or the cross-entropy, gives on the sources of data.eval, while the model is trained."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.base.errors import RunFailure, UserError
from megavlm.base.heartbeat import beat
from megavlm.base.number_format import counted
from megavlm.config.eval_section import MEASURES
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.evaluation.held_out_rows import HeldOutSource, filler
from megavlm.evaluation.plain_loss import PlainLoss
from megavlm.evaluation.untouched import raise_first, told, training_untouched
from megavlm.model.language import LanguageModel
from megavlm.platform import device
from megavlm.platform.collectives import all_gather_objects
from megavlm.records.records import Kind
from megavlm.records.skipped_samples import SkippedSample
from megavlm.runtime.feed import Feed, MicroBatch, StepRows
from megavlm.sources.blend import open_eval_sources
from megavlm.training.hooks import Fields
from megavlm.training.objective import Objective
from megavlm.training.run import Run


@dataclass(frozen=True)
class _Part:
    """What a leader has read for some forward passes; ``skipped`` are the samples that it could not use."""

    dp_rank: int
    rows: int = 0
    weight: float = 0.0
    skipped: tuple[SkippedSample, ...] = ()
    problem: Exception | None = None


class HeldOut:
    """Evaluates the model on data.eval. It is called on all ranks (see ``Hook``).

    Args:
        settings: the settings of the run.
        kind: what the method trains on. "pretrain" and "tune": the cross-entropy of the targets, with the weights of
            messages alone. "pair" and "judged": the objective of the method.
    """

    def __init__(self, settings: Settings, kind: Kind):
        self._settings, self._kind = settings, kind
        self._names = [source.label for source in settings.data.eval]
        self._source: HeldOutSource | None = None  # on leaders, from ``prepare`` on
        self._skipped: list[SkippedSample] | None = []  # None once they have been told

    def __call__(self, run: Run, step: int, say: Callable[[str], None]) -> Fields:
        """Evaluates, says the result, and returns fields for metrics.jsonl."""
        began = time.perf_counter()
        objective = self._objective(run)
        with training_untouched(run):
            totals = torch.zeros(len(self._names), objective.num_sums, dtype=torch.float64, device=device())
            weights = [self._evaluate(run, objective, number, totals[number]) for number in range(len(self._names))]
            dist.all_reduce(totals)
        fields = _fields("eval", objective, totals.sum(dim=0), sum(weights))
        if len(self._names) > 1:
            for name, sums, weight in zip(self._names, totals, weights, strict=True):
                fields |= _fields(f"eval/{name}", objective, sums, weight)
        say(told(step, fields, time.perf_counter() - began))
        if self._skipped:
            first = self._skipped[0]
            them = f"{counted(len(self._skipped), 'sample')} cannot be used"
            say(f"data.eval: {them}; the first is {first.sample}: {first.cause}")
        self._skipped = None
        return fields

    def _objective(self, run: Run) -> Objective:
        if self._kind in ("pretrain", "tune"):
            return PlainLoss(self._settings.train.logprob_chunk_tokens)
        return run.step.objective

    def prepare(self, run: Run) -> None:
        """Opens the sources on leaders. Raises UserError on all ranks if one cannot be read."""
        with training_untouched(run):
            self._open(run)

    def _open(self, run: Run) -> None:
        settings, groups = run.session.settings, run.session.groups
        problem = None
        if groups.is_leader:
            try:
                self._source = HeldOutSource(
                    open_eval_sources(settings.data),
                    Renderer(settings.model.hf, settings.data, settings.pad_multiple),
                    self._kind,
                    settings.data,
                    settings.eval.rows,
                    groups.dp_rank,
                    groups.dp_size,
                    required(settings.output, "output"),
                )
            except UserError as error:
                problem = error
        _parts_of_all(_Part(groups.dp_rank, problem=problem), run)

    def _evaluate(self, run: Run, objective: Objective, number: int, totals: Tensor) -> float:
        """Adds a source's sums on this rank to ``totals``, float64 [num_sums]. Returns the weight of the whole source.

        As many rows as a step has are looked at together.
        """
        step, parallel = run.step, run.session.settings.parallel
        rows = None
        if self._source is not None:
            rows = self._source.rows(number)
            rows = run.attach(rows) if run.attach is not None else rows
        weight = 0.0
        while True:
            taken, part = ([], None) if rows is None else _take(rows, step.num_micro_batches, objective, run)
            parts = _parts_of_all(part, run)
            if not (most := max(part.rows for part in parts)):
                return weight
            weight += sum(part.weight for part in parts)
            if self._skipped is not None:
                self._skipped += [skipped for part in parts for skipped in part.skipped]
            count = -(-most // parallel.pipeline) * parallel.pipeline  # as many as fill the pipeline
            if self._source is not None:
                taken += [filler(self._source.renderer)] * (count - len(taken))
            full = Feed(run.session.vlm, iter(taken) if self._source is not None else None).rows(count)
            assert full is not None, "there is at least one row"
            real = next(part.rows for part in parts if part.dp_rank == run.session.groups.dp_rank)
            totals += self._sums(run, objective, full, real)
            beat("evaluating held-out rows")

    def _sums(self, run: Run, objective: Objective, rows: StepRows, real: int) -> Tensor:
        """The objective's sums over the first ``real`` rows, float64 [num_sums]; 0 on ranks that do not count."""
        vlm, groups = run.session.vlm, run.session.groups.language

        def look_through(read: Callable[[LanguageModel, Tensor, MicroBatch], Tensor]) -> list[Tensor]:
            vlm.train(False)  # looking at a reference model ends in training mode
            return run.step.look_through(rows, read)

        found = objective.look_ahead(look_through)

        def read(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            if micro_batch.number >= real:
                return torch.zeros(objective.num_sums, dtype=torch.float64, device=device())
            micro_batch.found = found[micro_batch.number] if found else None
            return objective.loss(objective.outputs(chunk, hidden, micro_batch), micro_batch)[1].double()

        of_rows = look_through(read)
        if not of_rows or groups.tp.rank() > 0:
            return torch.zeros(objective.num_sums, dtype=torch.float64, device=device())
        return torch.stack(of_rows).sum(dim=0)


def _take(rows: Iterator[Row], count: int, objective: Objective, run: Run) -> tuple[list[Row], _Part]:
    """Reads rows on a leader."""
    taken: list[Row] = []
    problem = None
    try:
        taken += islice(rows, count)
    except (UserError, RunFailure) as error:
        problem = error
    skipped = tuple(skipped for row in taken for skipped in row.skipped_samples)
    weight = objective.weight(taken) if taken else 0.0
    return taken, _Part(run.session.groups.dp_rank, len(taken), weight, skipped, problem)


def _parts_of_all(part: _Part | None, run: Run) -> list[_Part]:
    """The parts of all leaders; None elsewhere. Raises the problem of the first that has one on all ranks."""
    parts = [part for part in all_gather_objects(part, run.session.groups.world_host) if part is not None]
    raise_first(part.problem for part in parts)
    return parts


def _fields(prefix: str, objective: Objective, sums: Tensor, weight: float) -> dict[str, float | None]:
    values = sums.tolist()
    fields = {"loss": values[0] / weight if weight else None, **objective.fields(values, {"weight": weight})}
    return {f"{prefix}/{name}": fields[name] for name in MEASURES if name in fields}
