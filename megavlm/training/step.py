"""A training step: encode the frames, run Megatron's schedule, run the tower's backward pass, update the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megavlm.base.errors import UserError
from megavlm.data.row import Row
from megavlm.model.tower_phase import Timer
from megavlm.model.vlm import VLM
from megavlm.monitor.phases import Phases
from megavlm.optim.optimizers import Optimizers
from megavlm.platform import Groups, device
from megavlm.platform.collectives import all_gather_objects
from megavlm.records.remarks import WORDS
from megavlm.records.skipped_samples import SkippedSample
from megavlm.runtime.expert_load import ExpertLoad
from megavlm.runtime.feed import Feed, MicroBatch, StepRows, Window
from megavlm.runtime.forward import encode_window, forward_chunk, forward_only, prepare_schedule
from megavlm.training.objective import Objective, Read, count_sources
from megavlm.training.skipped_steps import describe

_WINDOW = 4  # rows: enough frames for an even distribution over ranks, few enough for their features to fit


def raise_everywhere(problem: UserError | None, failed: bool, groups: Groups) -> None:
    """Raises NoRows on all ranks if one of them has ``failed``, with the ``problem`` of the first that has one."""
    here = torch.tensor([int(failed)])
    dist.all_reduce(here, op=dist.ReduceOp.MAX, group=groups.world_host)
    if here.item():
        raise _no_rows(problem, groups)


def _no_rows(problem: UserError | None, groups: Groups) -> "NoRows":
    """The error for all ranks, of which at least one has a ``problem``."""
    return NoRows(next(filter(None, all_gather_objects(problem, groups.world_host))))


class NoRows(UserError):
    """A step cannot be made, because a data-parallel rank cannot read its rows. Raised on all ranks with the cause."""

    def __init__(self, cause: UserError):
        super().__init__(cause.message, cause.remedy)
        self.status = cause.status


@dataclass
class StepResult:
    """The results of a step, over all ranks unless stated otherwise.

    Attributes:
        loss: the loss of the global batch.
        lr: the learning rate of the step.
        norms: gradient norms, from ``Optimizers.step``.
        counts: tokens, target_tokens, images, videos, samples, frames, frames_encoded (in the pass with gradients, so
            it is equal to frames unless an earlier pass has encoded them), row_tokens, the sums of squares for counting
            FLOPs, skipped_samples, and for each source samples/NAME, target_tokens/NAME, loss_weight/NAME, used/NAME
            and newly_read/NAME.
        fields: fields of the objective for metrics.jsonl.
        skipped_samples: the skipped samples of this data-parallel rank's rows.
        trouble: if the step was skipped, so that all state is unchanged, the reason; otherwise None.
    """

    loss: float
    lr: float
    norms: dict[str, float]
    counts: dict[str, float]
    fields: dict[str, float | None]
    skipped_samples: list[SkippedSample]
    trouble: str | None = None


@dataclass(frozen=True)
class Gradients:
    """What is known when the reduced gradients of a step are in the optimizers' buffers.

    Attributes:
        sums: float32 [num_sums + 1] on the device, the objective's sums over the global batch and ``frames_encoded``.
        counts: as in ``StepResult``, without ``frames_encoded``.
        skipped_samples: as in ``StepResult``.
        row_losses: each row of this rank and its loss, on the ranks of the last pipeline stage; [] on the other ranks.
    """

    sums: Tensor
    counts: dict[str, float]
    skipped_samples: list[SkippedSample]
    row_losses: list[tuple[Row, Tensor]]


class Step:
    """Runs training steps.

    Args:
        vlm: the model.
        optimizers: the optimizers of the model.
        feed: the source of rows.
        num_micro_batches: number of rows of a step for each data-parallel rank; the largest number if it differs.
        objective: the objective that is minimised.
        window: number of micro-batches whose frames are encoded together, before the decoder runs on them; their
            features are then released. None: ``_WINDOW``, or with several pipeline stages all micro-batches of the step
            (because each window fills and drains the pipeline).
        source_names: names of the data sources, in the order of their numbers.
        tower_timer: a context manager around what the tower computes on this rank without waiting for other ranks.
        phases: measures and names the phases of a step; None: nothing does.
        rows_of: the number of rows of each step, from 1, if it differs.
    """

    awake: Callable[[], AbstractContextManager] = nullcontext
    """The context within which the model is on the device, if it waits elsewhere (see ``runtime.parking``)."""

    def __init__(
        self,
        vlm: VLM,
        optimizers: Optimizers,
        feed: Feed,
        num_micro_batches: int,
        objective: Objective,
        window: int | None = None,
        source_names: Sequence[str] = ("data",),
        tower_timer: Timer = nullcontext,
        phases: Phases | None = None,
        rows_of: Callable[[int], int] | None = None,
    ):
        self.vlm, self.optimizers, self.feed = vlm, optimizers, feed
        self.num_micro_batches, self.objective = num_micro_batches, objective
        self.groups, self.source_names = vlm.groups, list(source_names)
        self._window, self._tower_timer = window, tower_timer
        self.phases = phases or Phases()
        self.expert_load = ExpertLoad(vlm)
        self._rows_of = rows_of or (lambda step: num_micro_batches)
        self._schedule = get_forward_backward_func()
        prepare_schedule(vlm.decoder_config)

    @property
    def window(self) -> int:
        """The number of micro-batches whose features exist at the same time in a step of ``num_micro_batches``."""
        return self._window_of(self.num_micro_batches)

    def _window_of(self, num_rows: int) -> int:
        return self._window or (_WINDOW if self.vlm.parallel.pipeline == 1 else num_rows)

    def __call__(self, number: int = 1, *, is_last: bool = False, wait: bool = True) -> StepResult:
        """Runs step ``number``. ``wait``: see ``Optimizers.step``."""
        rows = self.rows(self.feed, self._rows_of(number))
        if not is_last:
            with self.phases("data"):
                self.feed.read_ahead(self._rows_of(number + 1))
        return self.update(rows, wait=wait)

    def rows(self, feed: Feed, num_rows: int) -> StepRows:
        """Reads the next rows of ``feed``, at least one.

        Raises NoRows, on all ranks, if a rank cannot read its rows.
        """
        rows, problem = None, None
        try:
            with self.phases("data"):
                rows = feed.rows(num_rows)
        except UserError as error:
            problem = error
        counts = self._count(rows.hosts if rows is not None else [], failed=rows is None)
        if counts["failed"]:
            raise _no_rows(problem, self.groups)
        assert rows is not None, "the rows of training do not end"
        rows.counts = counts
        return rows

    def update(self, rows: StepRows, *, wait: bool = True) -> StepResult:
        """Updates the weights once. The pixels of the rows are released. ``wait``: see ``Optimizers.step``."""
        lr, part_lrs = self.optimizers.lr, self.optimizers.part_lrs
        found = self.gradients(rows)
        with self.phases("optimizer"):
            stats = self.optimizers.step(found.sums, found.counts["weight"], wait=wait)
        *sums, found.counts["frames_encoded"] = stats.sums
        trouble = describe(stats.non_finite, found.row_losses, self.groups) if stats.non_finite else None
        fields = self.objective.fields(sums, found.counts)
        if self.optimizers.train.lr_scale or self.optimizers.train.unfreeze_after:
            fields |= {f"lr/{part}": value for part, value in part_lrs.items()}
        return StepResult(stats.loss, lr, stats.norms, found.counts, fields, found.skipped_samples, trouble)

    def gradients(self, rows: StepRows) -> Gradients:
        """Runs rows forward and backward. The optimizers' buffers get the reduced gradients."""
        num_rows = len(rows.hosts)
        counts = dict(rows.counts or self._count(rows.hosts))
        row_losses: list[tuple[Row, Tensor]] = []
        self.optimizers.zero_grad()
        with self.phases("reference"):
            found = self.objective.look_ahead(partial(self.look_through, rows))
        self.vlm.tower.frames_encoded = 0
        # The features' gradients are scaled for an average over data- and context-parallel ranks, but the tower's DDP
        # averages over all ranks.
        tower_scale = dist.get_world_size() / (self.groups.dp_size * self.vlm.parallel.context)
        totals = torch.zeros(self.objective.num_sums + 1, dtype=torch.float32, device=device())
        for chunk in self.vlm.language:
            chunk.set_is_first_microbatch()  # of the step; see ``PartDDP``
        rows_done = 0
        for window in self.phases.during("data", self._windows(rows)):
            for micro_batch in window.micro_batches:
                micro_batch.found = found[micro_batch.number] if found else None
            if window.frames is not None:
                with self.phases("exchange"):
                    encode_window(self.vlm, window, self._tower_timer)
            rows_done += len(window.micro_batches)
            with self.phases("decoder"), self._reduction(is_last=rows_done == num_rows):
                losses = self._forward_backward(window, counts["weight"], num_rows)
            if losses:  # this is a rank of the last pipeline stage
                row_losses += zip((m.host for m in window.micro_batches), (sums[0] for sums in losses), strict=True)
            if losses and self.groups.language.tp.rank() == 0:
                totals[:-1] += torch.stack(losses).sum(dim=0)
            with self.phases("exchange"):
                self.vlm.tower.backward(tower_scale, self._tower_timer)
            del window  # so that its memory is free while the next window is made
        with self.phases("reduction"):
            totals[-1:].fill_(self.vlm.tower.frames_encoded)  # exact in float32 up to 16 million frames
            dist.all_reduce(totals)
            self.optimizers.reduce_gradients()
        self.expert_load.take_losses(num_rows)
        skipped_samples = [skipped for row in rows.hosts for skipped in row.skipped_samples]
        return Gradients(totals, counts, skipped_samples, row_losses)

    def look_through(self, rows: StepRows, read: Read) -> list[Tensor]:
        """Returns the result of ``read`` for each row on the last pipeline stage, else [] (see ``forward_only``)."""
        results: list[Tensor] = []
        self.optimizers.wait_for_weights()
        for window in self._windows(rows.copy()):
            results += forward_only(self.vlm, window, read)
        return results

    def _windows(self, rows: StepRows) -> Iterator[Window]:
        """The windows of the rows, with their features if an earlier pass has kept them (see ``StepRows``)."""
        if rows.encoded and rows.is_copy:
            yield from rows.encoded
            return
        if rows.encoded:
            while rows.encoded:
                yield rows.encoded.pop(0)
            return
        for window in self.feed.windows(rows, self._window_of(len(rows.hosts))):
            if rows.encoded is not None and rows.is_copy and not self.vlm.tower.is_trained:
                rows.encoded.append(window)
            yield window
            del window  # as in ``gradients``: this generator, too, would keep it while the next one is made

    @contextmanager
    def _reduction(self, *, is_last: bool) -> Iterator[None]:
        """Within the block the last micro-batch starts the reduction of the decoder's gradients if it ``is_last``.

        Megatron's schedule suspends reduction until its own last micro-batch, but runs once for each window of a step.
        """
        suspend = [ddp.no_sync for ddp in self.optimizers.ddp.get("language", [])]
        config = self.vlm.decoder_config
        with ExitStack() as stack:
            if is_last and suspend:
                config.no_sync_func = suspend if len(suspend) > 1 else suspend[0]
            else:
                for hold in suspend:
                    stack.enter_context(hold())
            try:
                yield
            finally:
                config.no_sync_func = None

    def _forward_backward(self, window: Window, weight: float, num_rows: int) -> list[Tensor]:
        """Computes the gradients of the decoder and of the features.

        Returns:
            The sums of each row on the last pipeline stage, [] on the other stages. They stay on the device, because
            reading them here would delay the tower's backward pass.
        """
        micro_batches = window.micro_batches
        chunks = self.optimizers.ddp.get("language", self.vlm.language)  # in DDP wrappers as soon as they are trained
        # Megatron divides by the number of micro-batches and data-parallel ranks, but the loss is a sum over the global
        # batch that is divided once.
        scale = len(micro_batches) * self.groups.dp_size / max(weight, 1e-12)
        # the balancing loss of experts is a mean over all micro-batches of the step, not over those of the window
        balancing = len(micro_batches) / num_rows
        self.vlm.decoder_config.moe_grad_scale_func = lambda: torch.full((), balancing, device=device())
        return self._schedule(
            forward_step_func=partial(self._forward_step, scale=scale),
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=len(micro_batches[0].host.input_ids),
            micro_batch_size=1,
            forward_only=False,
        )

    def _forward_step(
        self, micro_batches: Iterator[MicroBatch], model: nn.Module, scale: float
    ) -> tuple[Tensor, Callable | None]:
        """Megatron's ``forward_step_func``: returns hidden states, or on the last stage the outputs and their loss."""
        micro_batch: MicroBatch = next(micro_batches)
        chunk = unwrap_model(model)
        with self.expert_load.counting():
            hidden = forward_chunk(self.vlm, chunk, micro_batch)
        if not chunk.post_process:
            return hidden, None
        self.optimizers.wait_for_weights()  # which the head reads without calling a module
        with self.phases("head"):
            outputs = self.objective.outputs(chunk, hidden, micro_batch)
        self.phases.backward("head", outputs, hidden)
        return outputs, partial(self._loss, micro_batch, scale)

    def _loss(self, micro_batch: MicroBatch, scale: float, outputs: Tensor) -> tuple[Tensor, Tensor]:
        with self.phases("head"):
            loss, sums = self.objective.loss(outputs, micro_batch)
        return loss * scale, sums

    def _count(self, rows: list[Row], *, failed: bool = False) -> dict[str, float]:
        """Computes sums over the global batch, without waiting for the device; and how many ranks have ``failed``."""
        skipped_samples = [skipped for row in rows for skipped in row.skipped_samples]
        here = {
            "weight": self.objective.weight(rows),
            "tokens": sum(row.num_tokens for row in rows),
            "row_tokens": sum(len(row.input_ids) for row in rows),
            "target_tokens": sum(row.num_targets for row in rows),
            "images": sum(row.num_images for row in rows),
            "videos": sum(row.num_videos for row in rows),
            "samples": sum(row.num_samples for row in rows),
            "segment_squares": sum(float(n) ** 2 for row in rows for n in row.segment_lengths[: row.num_samples]),
            "patches": sum(n for row in rows for n in row.frame_lengths),
            "frame_squares": sum(float(n) ** 2 for row in rows for n in row.frame_lengths),
            "frames": sum(len(row.frame_lengths) for row in rows),
            "skipped_samples": len(skipped_samples),
            **{name: sum(row.remarks.count(name) for row in rows) for name in WORDS},
            **count_sources(rows, self.source_names),
        }
        if not self.groups.is_leader:  # the ranks of a model-parallel group have the same rows, which count once
            here = dict.fromkeys(here, 0.0)
        here["failed"] = float(failed)
        sums = torch.tensor(list(here.values()), dtype=torch.float64)
        dist.all_reduce(sums, group=self.groups.world_host)
        return dict(zip(here, sums.tolist(), strict=True))
