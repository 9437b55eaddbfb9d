"""The operators of one step on one rank: a real micro-batch is run, and counted as often as a step has it.

A step's micro-batches are alike, so the decoder runs as few as its schedule takes. The tower encodes a whole window,
because frames are distributed over ranks only as a whole.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from megavlm.data.row import Row
from megavlm.model.vlm import VLM
from megavlm.optim.grad_stats import count_non_finite
from megavlm.optim.optimizers import Optimizers
from megavlm.plan.step_memory import RowsAtHand
from megavlm.runtime.forward import encode_window
from megavlm.tracing.balanced_experts import BalancedExperts
from megavlm.tracing.dispatch import Together
from megavlm.tracing.known_shapes import KnownShapes
from megavlm.tracing.live_memory import LiveMemory, PhasesOf
from megavlm.tracing.operators import Call, Example, Operators, Place, group_names
from megavlm.training.objective import Objective
from megavlm.training.step import Step

Counts = Mapping[Call, float]
"""How often each operator is called; of parts of a step that are alike, a mean."""

PER_MICRO_BATCH = ("forward", "backward", "head", "head_backward")
PER_WINDOW = ("tower", "tower_backward", "exchange", "exchange_backward")
PER_STEP = ("reduction", "overlapped", "optimizer")
_PARTS = {  # of phases, forward and backward
    "decoder": ("forward", "backward"),
    "head": ("head", "head_backward"),
    "tower": ("tower", "tower_backward"),
    "exchange": ("exchange", "exchange_backward"),
    "data": ("exchange", "exchange_backward"),
}


@dataclass(frozen=True)
class StageOperators:
    """The operators of the first rank of a pipeline stage.

    Attributes:
        parts: by part: "forward", "backward", "head" and "head_backward" of a micro-batch; "tower", "tower_backward",
            "exchange" and "exchange_backward" of a window; "reduction", "overlapped" (the reduction of gradients during
            the last backward pass) and "optimizer" of a step.
        chunks: number of the stage's pipeline chunks, over which the operators of a micro-batch are spread evenly.
    """

    parts: Mapping[str, Counts]
    chunks: int = 1

    def of_step(self, micro_batches: int, windows: float) -> Counts:
        """All operators of a step."""
        total: dict[Call, float] = defaultdict(float)
        for name, counts in self.parts.items():
            times = micro_batches if name in PER_MICRO_BATCH else windows if name in PER_WINDOW else 1
            for call, count in counts.items():
                total[call] += count * times
        return total


def stage_operators(
    vlm: VLM,
    optimizers: Optimizers,
    objective: Objective,
    row: Row,
    window: int,
    where: torch.device,
    *,
    examples: dict[Call, Example] | None = None,
) -> StageOperators:
    """Runs a step and records it. Gradients stay in the buffers; on a real device, weights change.

    Args:
        vlm, optimizers, objective: the model and what trains it.
        row: the row of every micro-batch.
        window: number of micro-batches whose frames are encoded together.
        where: the device: that of the model.
        examples: gets an example of each operator.
    """
    parallel = vlm.parallel
    few = min(window, parallel.pipeline if parallel.virtual_pipeline else 1)
    names = ["data"] * (1 + max(row.source_ids))
    record = Operators(where, group_names(vlm.groups), keep_examples=examples is not None)
    phases = PhasesOf(record)
    timer, feed = partial(phases, "tower"), RowsAtHand(vlm, [row] * few)
    step = Step(vlm, optimizers, feed, few, objective, few, names, timer, phases)
    is_absent = where.type == "meta"
    if is_absent:
        vlm.decoder_config.batch_p2p_comm = False  # torch cannot batch sends of meta tensors
    with BalancedExperts(vlm) if is_absent else nullcontext(), record, phases.step():
        step.gradients(feed.rows(few))
        with phases("optimizer"):
            _update(optimizers)
    parts = parts_of(record.found, few)
    if window > few:
        of_window = Operators(where, group_names(vlm.groups), keep_examples=examples is not None)
        _encode(vlm, row, window, of_window)
        parts |= {name: counts for name, counts in parts_of(of_window.found, 1).items() if name in PER_WINDOW}
        record.examples |= of_window.examples
    if examples is not None:
        examples |= record.examples
    return StageOperators(parts, parallel.virtual_pipeline or 1)


def update_operators(vlm: VLM, optimizers: Optimizers, where: torch.device) -> tuple[dict[str, Counts], int]:
    """The operators of the parts "reduction", "overlapped" and "optimizer" of a step, carried out on their own.

    Also returns the bytes that are alive of what they make, at the fullest moment. The optimizers' state must exist.
    """
    record, memory = Operators(where, group_names(vlm.groups)), LiveMemory(where)
    phases = PhasesOf(record)
    with Together(KnownShapes(), record, memory), phases.step():
        with phases("decoder"):
            for ddp in optimizers.ddp.get("language", []):
                if ddp.ddp_config.overlap_grad_reduce:
                    ddp.start_grad_sync()
        with phases("reduction"):
            optimizers.reduce_gradients()
        with phases("optimizer"):
            _update(optimizers)
    parts = parts_of(record.found, 1)
    if optimizers.train.offload_optimizer:
        stored = (opt.optimizer for opt in optimizers.optimizer.chained_optimizers if opt.optimizer is not None)
        state = sum(tensor.nbytes for adam in stored for tensor in adam.held())
        parts["optimizer"][Call("host", "copy", (), "float32", 0, 2 * state)] = 1.0  # to the device and back
    return {name: parts[name] for name in PER_STEP}, memory.peak


def _update(optimizers: Optimizers) -> None:
    squares = optimizers.grad_squares()
    count_non_finite(torch.cat([squares.new_zeros(1), squares]))  # of the loss, too
    optimizers.apply(1.0)


def _encode(vlm: VLM, row: Row, window: int, record: Operators) -> None:
    """Encodes the frames of a window, and runs the tower's backward pass."""
    phases, feed = PhasesOf(record), RowsAtHand(vlm, [row] * window)
    timer = partial(phases, "tower")
    with record, phases.step():
        (encoded,) = phases.during("data", feed.windows(feed.rows(window), window))
        with phases("exchange"):
            encode_window(vlm, encoded, timer)
        with phases("decoder"):
            for micro_batch in encoded.micro_batches:
                if micro_batch.features is not None and micro_batch.features.requires_grad:
                    micro_batch.features.grad = torch.zeros_like(micro_batch.features)
        with phases("exchange"):
            vlm.tower.backward(1.0, timer)


def parts_of(found: Mapping[tuple[Place, Call], float], micro_batches: int) -> dict[str, dict[Call, float]]:
    parts: dict[str, dict[Call, float]] = {
        name: defaultdict(float) for name in (*PER_MICRO_BATCH, *PER_WINDOW, *PER_STEP)
    }
    for (place, call), count in found.items():
        part = _PARTS[place.phase][place.backward] if place.phase in _PARTS else "reduction"
        if place.phase == "optimizer":
            part = "optimizer"
        if part in PER_MICRO_BATCH and call.group == "data":
            part = "overlapped"  # once in a step
        parts[part][call] += count / micro_batches if part in PER_MICRO_BATCH else count
    return parts
