"""The memory of a step beyond what a rank holds all the time: a real step is run, and living tensors are counted.

The step is that of training, with its feed, tower, pipeline schedule, head and backward passes. On the meta device it
computes nothing and allocates nothing, but its tensors live as long as real ones would.
"""

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.vlm import VLM
from megavlm.optim.optimizers import Optimizers
from megavlm.runtime.feed import Feed, MicroBatch, StepRows
from megavlm.tracing.balanced_experts import BalancedExperts
from megavlm.tracing.fused_layers import fused_layers
from megavlm.tracing.live_memory import LiveMemory, PhasesOf
from megavlm.training.objective import Objective
from megavlm.training.step import Step


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes of a step's tensors on a rank.

    Attributes:
        phase: the phase of the step in which it is reached (``monitor.phases.PHASES``).
        by_phase: what is alive at that moment, by the phase in which it was made.
    """

    phase: str
    by_phase: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.by_phase.values())


class RowsAtHand(Feed):
    """A feed with rows of its own, because on the meta device no leader sends any."""

    def __init__(self, vlm: VLM, rows: list[Row]):
        super().__init__(vlm, None)
        self._rows = rows

    def rows(self, num_rows: int) -> StepRows:
        return StepRows(self._rows, list(self._rows) if self.groups.is_leader else [])


class EqualRows(RowsAtHand):
    """Rows that are one and the same: the first one is laid out for the meta device, the others have its tensors."""

    def _micro_batch(self, host: Row, number: int) -> MicroBatch:
        if number == 0:
            self._first = super()._micro_batch(host, number)
            return self._first
        return copy(self._first)

    @property
    def size(self) -> int:
        """Bytes of the tensors of a micro-batch that has been laid out, which each would take."""
        return sum(tensor.numel() * tensor.itemsize for tensor in _meta_tensors(self._first).values())


def _meta_tensors(value: Any) -> dict[int, Tensor]:
    """The tensors on the meta device in a dataclass, by their ids, as some stand in several places."""
    if isinstance(value, Tensor):
        return {id(value): value} if value.is_meta else {}
    if not is_dataclass(value) or isinstance(value, Row | type):
        return {}
    found: dict[int, Tensor] = {}
    for field in fields(value):
        found |= _meta_tensors(getattr(value, field.name))
    return found


def peak_of(
    vlm: VLM,
    optimizers: Optimizers,
    objective: Objective,
    rows: list[Row],
    window: int | None,
    where: torch.device,
    imbalance: float = 1.0,
    fused: Settings | None = None,
) -> Peak:
    """Runs the rows forward and backward, and returns the peak. Gradients stay in the buffers.

    Args:
        vlm, optimizers, objective: the model and what trains it.
        rows: the rows of this data-parallel rank.
        window: see ``Step``.
        where: the device that is counted: that of the model.
        imbalance: tokens of this rank's experts over the mean of the expert-parallel ranks; on the meta device alone.
        fused: the settings of a run whose layers are Transformer Engine's (``fused_layers``); on the meta device alone.
    """
    memory = LiveMemory(where)
    phases = PhasesOf(memory)
    feed, timer = RowsAtHand(vlm, rows), partial(phases, "tower")
    names = ["data"] * (1 + max(number for row in rows for number in row.source_ids))
    step = Step(vlm, optimizers, feed, len(rows), objective, window, names, timer, phases)
    is_absent = where.type == "meta"
    if is_absent:
        vlm.decoder_config.batch_p2p_comm = False  # torch cannot batch sends of meta tensors
    experts = BalancedExperts(vlm, imbalance) if is_absent else nullcontext()
    layers = nullcontext() if fused is None else fused_layers(vlm, fused)
    with experts, memory, layers, phases.step():
        step.gradients(feed.rows(len(rows)))
    return Peak(memory.peak_phase, memory.at_peak)
