"""The memory of a step on a rank, put together from what one micro-batch does in each chunk of the decoder.

A window of micro-batches is encoded, one of them runs forward and backward through each chunk, and the tower's backward
pass follows, all with the real model and few of its like layers (``stand_in``). How many micro-batches are under way
at a time follows from the schedule.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

from megavlm.config.sections import ParallelSettings
from megavlm.data.row import Row
from megavlm.model.language import LanguageModel
from megavlm.model.shapes import Shapes
from megavlm.plan.absent_rank import TrainedModel
from megavlm.plan.balanced_experts import BalancedExperts
from megavlm.plan.live_memory import LiveMemory, PhasesOf
from megavlm.plan.stand_in import stand_in
from megavlm.plan.step_memory import Peak, RowsAtHand
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.forward import encode_window, forward_chunk, prepare_schedule


@dataclass(frozen=True)
class ChunkMemory:
    """What a micro-batch does in a chunk of the decoder, in bytes by phase, beside what was alive before.

    Attributes:
        forward, backward: the fullest moment of each pass.
        kept: between the passes.
        left: after both: gradients of features.
    """

    forward: Peak
    kept: dict[str, int]
    backward: Peak
    left: dict[str, int]


@dataclass(frozen=True)
class StageMemory:
    """A window on one rank.

    Attributes:
        encode: the fullest moment until the tower has encoded the window.
        before: bytes by phase when the decoder begins: rows, features, and what the tower keeps.
        chunks: what each chunk of the decoder does.
        tower: the fullest moment of the tower's backward pass.
    """

    encode: Peak
    before: dict[str, int]
    chunks: list[ChunkMemory]
    tower: Peak

    def peak(self, stage: int, stages: int, window: int) -> Peak:
        """The fullest moment of a step with this many micro-batches in a window."""
        decoder = Peak("decoder", {})
        alive, done, most = Counter(), Counter(), -1
        sizes = [[sum(part.values()) for part in (c.forward.by_phase, c.kept, c.backward.by_phase, c.left)]
                 for c in self.chunks]  # fmt: skip
        for chunk, is_forward in schedule(stage, stages, len(self.chunks), window):
            alive[chunk] -= not is_forward
            done_bytes = sum(sizes[c][3] * count for c, count in done.items())
            total = sum(sizes[c][1] * count for c, count in alive.items()) + done_bytes + sizes[chunk][0 if is_forward else 2]
            if total > most:
                most, moment = total, (chunk, is_forward, Counter(alive), Counter(done))
            (alive if is_forward else done)[chunk] += 1
        chunk, is_forward, alive, done = moment
        of = self.chunks[chunk].forward if is_forward else self.chunks[chunk].backward
        parts = [(self.before, 1), (of.by_phase, 1)]
        parts += [(self.chunks[c].kept, count) for c, count in alive.items()]
        parts += [(self.chunks[c].left, count) for c, count in done.items()]
        decoder = Peak(of.phase, _sum(parts))
        return max(self.encode, decoder, self.tower, key=lambda peak: peak.total)


def schedule(stage: int, stages: int, chunks: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """Megatron's 1F1B schedule on a pipeline stage, interleaved if it has several chunks: (chunk, whether forward)."""
    order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, stages)]
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, len(order))
    for number in range(len(order) + ahead):
        if number < len(order):
            yield order[number], True
        if number >= ahead:
            yield chunks - 1 - order[number - ahead], False


def stage_memory(
    model: TrainedModel, row: Row, window: int, shapes: Shapes, parallel: ParallelSettings, stage: int
) -> StageMemory:
    """Runs a window on a rank of an absent world.

    Args:
        model: the model, built with the result of ``fewer_layers``.
        row: each row.
        window: number of rows that are encoded together.
        shapes, parallel: the shapes of the whole model, and its layout.
        stage: the pipeline stage of the rank.
    """
    vlm = model.vlm
    memory = LiveMemory(torch.device("meta"))
    stand_in(memory, vlm, shapes, parallel, stage)
    phases = PhasesOf(memory)
    prepare_schedule(vlm.decoder_config)
    feed = RowsAtHand(vlm, [row] * window)
    with BalancedExperts(vlm), memory, phases.step():
        (batch,) = phases.during("data", feed.windows(feed.rows(window), window))
        with phases("exchange"):
            encode_window(vlm, batch, partial(phases, "tower"))
        encode, before = _peak(memory), dict(memory.by_phase)
        with phases("decoder"):
            chunks = [_run(model, chunk, batch.micro_batches[0], memory, phases) for chunk in vlm.language]
        for other in batch.micro_batches[1:]:
            mine = batch.micro_batches[0].features
            if mine is not None and mine.grad is not None and other.features is not None:
                with phases("decoder"):
                    other.features.grad = torch.empty_like(other.features)
        memory.watch()
        with phases("exchange"):
            vlm.tower.backward(1.0, partial(phases, "tower"))
        tower = _peak(memory)
    return StageMemory(encode, before, chunks, tower)


def _run(
    model: TrainedModel, chunk: LanguageModel, micro_batch: MicroBatch, memory: LiveMemory, phases: PhasesOf
) -> ChunkMemory:
    """Runs a micro-batch through a chunk, forward and backward."""
    start = Counter(memory.by_phase)
    memory.watch()
    received, outputs = None, None
    if not chunk.pre_process:
        tokens = len(micro_batch.input_ids) // (chunk.config.tensor_model_parallel_size if chunk.config.sequence_parallel else 1)
        received = torch.empty(tokens, 1, chunk.config.hidden_size, dtype=chunk.config.pipeline_dtype, requires_grad=True)
        chunk.set_input_tensor(received)
    hidden = forward_chunk(model.vlm, chunk, micro_batch)
    sums: Tensor | None = None
    if chunk.post_process:
        with phases("head"):
            outputs = model.objective.outputs(chunk, hidden, micro_batch)
        phases.backward("head", outputs, hidden)
        with phases("head"):
            hidden, sums = model.objective.loss(outputs, micro_batch)
    forward, kept = _peak(memory, start), _less(memory.by_phase, start)
    memory.watch()
    if hidden.requires_grad:
        torch.autograd.backward(hidden, None if chunk.post_process else torch.empty_like(hidden))
    backward = _peak(memory, start)
    del hidden, outputs, received
    chunk.decoder.input_tensor = None
    return ChunkMemory(forward, kept, backward, _less(memory.by_phase, start))


def _peak(memory: LiveMemory, start: Mapping[str, int] | None = None) -> Peak:
    return Peak(memory.peak_phase, _less(memory.at_peak, start or {}))


def _less(sizes: Mapping[str, int], start: Mapping[str, int]) -> dict[str, int]:
    return {phase: sizes.get(phase, 0) - start.get(phase, 0) for phase in {*sizes, *start}}


def _sum(parts: list[tuple[Mapping[str, int], int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for sizes, times in parts:
        for phase, size in sizes.items():
            total[phase] += size * times
    return {phase: size for phase, size in total.items() if size}
