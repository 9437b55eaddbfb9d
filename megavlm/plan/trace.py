"""Runs a part of a step on a rank of an absent world, from which its memory and its operators are told.

A window of micro-batches is encoded, one of them runs forward and backward through each chunk, and the tower's backward
pass follows, all with the real model and few of its like layers (``stand_in``).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.config.sections import ParallelSettings
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.language import LanguageModel
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.plan.stage_memory import ChunkMemory, StageMemory
from megavlm.plan.stage_operators import StageOperators, parts_of
from megavlm.plan.step_memory import EqualRows, Peak
from megavlm.platform import device
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.forward import encode_window, forward_chunk, prepare_schedule
from megavlm.tracing.absent_rank import TrainedModel
from megavlm.tracing.balanced_experts import BalancedExperts
from megavlm.tracing.computed_again import ComputedAgain, in_backward
from megavlm.tracing.dispatch import Together
from megavlm.tracing.fused_layers import fused_layers
from megavlm.tracing.grouped_experts import Experts
from megavlm.tracing.live_memory import LiveMemory, PhasesOf
from megavlm.tracing.operators import Operators, group_names
from megavlm.tracing.stand_in import StandIns, layers_of, stand_in

_META = torch.device("meta")


def trace_stage(
    model: TrainedModel,
    row: Row,
    mean_row: Row,
    window: int,
    shapes: Shapes,
    parallel: ParallelSettings,
    stage: int,
    imbalance: float | None = 1.0,
    fused: Settings | None = None,
) -> tuple[StageMemory, StageOperators]:
    """Runs a window on a rank of an absent world.

    Args:
        model: the model, built with the result of ``fewer_layers``.
        row: each row, for the memory.
        mean_row: each row, for the operators; the same object if it is the same row.
        window: number of rows that are encoded together.
        shapes, parallel: the shapes of the whole model, and its layout.
        stage: the pipeline stage of the rank.
        imbalance: see ``BalancedExperts``; for the memory alone. None: the memory is about that of balanced
            experts, on a stage without features.
        fused: the settings of a run with Transformer Engine's layers, whose memory is counted as they keep it. None:
            that of the portable layers. The operators are always those of the portable layers, whose matrix products
            are the same (``unfused`` in gpus.yaml is for the others).

    Returns:
        What is alive, and the operators of a micro-batch and of a window.
    """
    vlm = model.vlm
    memory, operators = LiveMemory(_META), Operators(_META, group_names(vlm.groups))
    stand_ins = stand_in(memory, operators, vlm, shapes, parallel, stage)
    trace = _Trace(model, memory, operators, stand_ins, layers_of(parallel, shapes.text.layers, stage))
    experts = Experts(operators)
    experts.watch(vlm, shapes.text.moe.num_experts // parallel.expert if shapes.text.moe else 1)
    prepare_schedule(vlm.decoder_config)
    with Together(BalancedExperts(vlm), operators, memory):
        found = trace.run(mean_row, window)
    parts = parts_of(experts.grouped(operators.found), 1)
    if fused is None and imbalance is None and row is mean_row:
        chunks = [replace(chunk, left={}) for chunk in found.chunks]  # it is what the first micro-batch alone leaves
        found = replace(found, chunks=chunks)
    elif fused is not None or row is not mean_row or _has_experts(vlm):
        layers = nullcontext() if fused is None else fused_layers(vlm, fused)
        # What dispatchers remember of one micro-batch, the next one replaces.
        with Together(BalancedExperts(vlm, imbalance or 1.0), memory), layers:
            found = trace.run(row, window)
    return found, StageOperators(parts, len(vlm.language))


def _has_experts(vlm: VLM) -> bool:
    return vlm.decoder_config.num_moe_experts is not None


@dataclass
class _Trace:
    model: TrainedModel
    memory: LiveMemory
    operators: Operators
    stand_ins: Sequence[StandIns]
    layers: int

    def __post_init__(self) -> None:
        vlm, memory = self.model.vlm, self.memory
        self._tower = ComputedAgain(memory, vlm.vision, lambda: vlm.tower.recompute and torch.is_grad_enabled())
        layers = [chunk.decoder.layers[-min(2, len(chunk.decoder.layers))] for chunk in vlm.language]
        self._again = [
            [ComputedAgain(memory, module, in_backward) for module in (layer, layer.self_attention.core_attention)]
            for layer in layers
        ]

    def run(self, row: Row, window: int) -> StageMemory:
        """Encodes a window of equal rows, runs one through each chunk, and the tower's backward pass."""
        vlm, memory = self.model.vlm, self.memory
        memory.watch()
        feed, phases = EqualRows(vlm, [row] * window), PhasesOf(_Both(memory, self.operators))
        with phases.step():
            (batch,) = phases.during("data", feed.windows(feed.rows(window), window))
            others = {"data": (window - 1) * feed.size}
            memory.add(others)
            with phases("exchange"):
                encode_window(vlm, batch, partial(phases, "tower"))
            encode, before = _peak(memory), dict(memory.by_phase)
            with phases("decoder"), _without_reduction(self.model):
                first, chunks = batch.micro_batches[0], []
                for chunk, stand_ins, again in zip(vlm.language, self.stand_ins, self._again, strict=True):
                    for counted in again:
                        counted.restart()
                    ran = _run(self.model, chunk, first, memory, phases)
                    layer, attention = (counted.size for counted in again)
                    on_host = (self.layers - (not chunk.pre_process)) * ran.on_host  # see ``HostStates.of``
                    chunks.append(replace(ran, layers=self.layers, again=layer, attention=attention, on_host=on_host))
                    stand_ins.add_remembered(ran.left, first.features)
                if first.features is not None and first.features.grad is not None:
                    for other in batch.micro_batches[1:]:
                        assert other.features is not None
                        other.features.grad = torch.empty_like(other.features)
            memory.watch()
            self._tower.restart()
            with phases("exchange"):
                vlm.tower.backward(1.0, partial(phases, "tower"))
            found = StageMemory(encode, before, chunks, _peak(memory), self._tower.size)
            memory.add(others, -1)
            return found


@contextmanager
def _without_reduction(model: TrainedModel) -> Iterator[None]:
    with ExitStack() as stack:
        for ddp in model.optimizers.ddp.get("language", []):
            stack.enter_context(ddp.no_sync())
        yield


class _Both:
    """Tells the phase to what counts memory and to what counts operators."""

    def __init__(self, memory: LiveMemory, operators: Operators):
        self._counting = memory, operators

    @property
    def phase(self) -> str:
        return self._counting[0].phase

    @phase.setter
    def phase(self, name: str) -> None:
        for counting in self._counting:
            counting.phase = name


def _run(
    model: TrainedModel, chunk: LanguageModel, micro_batch: MicroBatch, memory: LiveMemory, phases: PhasesOf
) -> ChunkMemory:
    """Runs a micro-batch through a chunk, forward and backward. What is in host memory is that of one layer."""
    start = Counter(memory.by_phase)
    memory.watch()
    neighbours = _Neighbours(model.vlm, chunk)
    neighbours.receive(micro_batch)
    output = forward_chunk(model.vlm, chunk, micro_batch)
    of_layer = output.nbytes if chunk.host_states is not None else 0  # its input has the same shape
    if chunk.post_process:
        hidden = output
        with phases("head"):
            outputs = model.objective.outputs(chunk, hidden, micro_batch)
        phases.backward("head", outputs, hidden)
        del hidden
        with phases("head"):
            output, _sums = model.objective.loss(outputs, micro_batch)
        del outputs
    else:
        neighbours.send(output)
    forward, kept = _peak(memory, start), _less(memory.by_phase, start)
    memory.watch()
    if output.requires_grad:
        torch.autograd.backward(output, None if chunk.post_process else neighbours.gradient(output))
    backward = _peak(memory, start)
    neighbours.done()
    del output
    return ChunkMemory(forward, kept, backward, _less(memory.by_phase, start), on_host=of_layer)


class _Neighbours:
    """What a chunk receives from the chunks before and behind it, and sends to them, as Megatron's schedules do."""

    def __init__(self, vlm: VLM, chunk: LanguageModel):
        self._chunk, self._group = chunk, vlm.groups.language.pp
        self._received: Tensor | None = None
        self._sends = self._group.size() > 1

    def receive(self, micro_batch: MicroBatch) -> None:
        """Gives the chunk the hidden states of the one before it."""
        if not self._chunk.pre_process:
            config = self._chunk.config
            slices = config.tensor_model_parallel_size if config.sequence_parallel else 1
            shape = len(micro_batch.input_ids) // slices, 1, config.hidden_size
            self._received = torch.empty(shape, dtype=config.pipeline_dtype, device=device(), requires_grad=True)
            self._chunk.set_input_tensor(self._received)

    def send(self, output: Tensor) -> None:
        """Sends the hidden states to the next chunk."""
        self._to_neighbour(output.detach(), 1)

    def gradient(self, output: Tensor) -> Tensor:
        """The gradient of the hidden states, from the next chunk."""
        return torch.empty_like(output)

    def done(self) -> None:
        """Sends the gradient of what was received to the chunk before."""
        if self._received is not None:
            if self._received.grad is not None:
                self._to_neighbour(self._received.grad, -1)
            self._chunk.decoder.input_tensor = None  # as a schedule lets go of it
            self._received = None

    def _to_neighbour(self, tensor: Tensor, step: int) -> None:
        if self._sends:
            ranks = dist.get_process_group_ranks(self._group)
            dist.send(tensor, ranks[(self._group.rank() + step) % len(ranks)], group=self._group)


def _peak(memory: LiveMemory, start: Mapping[str, int] | None = None) -> Peak:
    return Peak(memory.peak_phase, _less(memory.at_peak, start or {}))


def _less(sizes: Mapping[str, int], start: Mapping[str, int]) -> dict[str, int]:
    return {phase: sizes.get(phase, 0) - start.get(phase, 0) for phase in {*sizes, *start}}
