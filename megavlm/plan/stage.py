"""What the first rank of each pipeline stage holds and computes: the facts from which a layout is planned."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import NamedTuple

import torch

from megavlm.align.registry import METHODS, make_method
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.plan.further_memory import further_memory, sampling_memory
from megavlm.plan.mix import DataMix, Mix
from megavlm.plan.stage_memory import StageMemory, trace_stage
from megavlm.plan.stage_operators import Counts, StageOperators, update_operators
from megavlm.plan.step_memory import Peak, RowsAtHand
from megavlm.runtime.session import Session
from megavlm.tracing.absent_rank import TrainedModel, absent_rank, that_can_be_absent
from megavlm.tracing.stand_in import fewer_experts, fewer_layers, layers_of
from megavlm.tracing.static_memory import StaticCount, StaticMemory, make_state
from megavlm.training.method import Method
from megavlm.training.step import Step

_META = torch.device("meta")


@dataclass(frozen=True)
class Layout:
    """A run on a cluster.

    Attributes:
        settings: the settings of the run.
        shapes: the model's shapes.
        verb: a key of ``METHODS``.
        world_size: number of GPUs.
        mix: what the rows contain.
        rows: their number in a step on a data-parallel rank.
        imbalance: see ``BalancedExperts``.
    """

    settings: Settings
    shapes: Shapes
    verb: str
    world_size: int
    mix: Mix | DataMix
    rows: int
    imbalance: float

    @cached_property
    def row(self) -> Row:
        """The row that needs most memory."""
        return self.mix.row(self.settings, self.shapes)

    @cached_property
    def mean_row(self) -> Row:
        """The row with as much work as the mean row."""
        return self.mix.mean_row(self.settings, self.shapes) if isinstance(self.mix, DataMix) else self.row

    @cached_property
    def method(self) -> Method:
        """The training method."""
        return make_method(self.verb, self.settings)

    def rank(self, stage: int) -> int:
        """The first rank of a pipeline stage."""
        return self.world_size // self.settings.parallel.pipeline * stage


@dataclass(frozen=True)
class Stage:
    """The first rank of a pipeline stage.

    Attributes:
        static: what it holds all the time.
        memories: what is alive in a step, of each model that is trained.
        sampling: bytes of the sampling, which comes before the step.
        operators: what the main model computes.
        window: number of micro-batches whose frames are encoded together.
        adapted: the parts with adapters.
    """

    static: StaticMemory
    memories: list[StageMemory]
    sampling: int
    operators: StageOperators
    window: int
    adapted: Collection[str]

    def peak(self, number: int, stages: int) -> Peak:
        """The fullest moment of a step, of the model that needs most, if this is stage ``number``."""
        peaks = [memory.peak(number, stages, self.window) for memory in self.memories]
        peaks.append(Peak("sampling", {"sampling": self.sampling}))
        return max(peaks, key=lambda peak: peak.total)


def stages_of(layout: Layout) -> list[Stage]:
    """All stages. Those in the middle are alike, so one of them is built."""
    found: list[Stage] = []
    stages = layout.settings.parallel.pipeline
    levels = len(layout.shapes.vision.deepstack_layers)
    middle_is_plain = layers_of(layout.settings.parallel, layout.shapes.text.layers, 0) >= levels
    for number in range(stages):
        is_known = 2 <= number < stages - 1 and middle_is_plain
        found.append(found[-1] if is_known else stage_of(layout, number))
    return found


def rough_stages_of(layout: Layout, limit: int) -> list[Stage]:
    """All stages, told by the first and the last one, with few layers.

    Args:
        layout: the run.
        limit: if the first stage needs more bytes than this, it stands for the last one, too.
    """
    stages = layout.settings.parallel.pipeline
    first = stage_of(layout, 0, exact=False)
    if stages == 1 or first.static.total + first.peak(0, stages).total > limit:
        return [first] * stages
    return [first] * (stages - 1) + [stage_of(layout, stages - 1, exact=False)]


def stage_of(layout: Layout, number: int, *, exact: bool = True) -> Stage:
    """Builds the first rank of a stage and lets it run.

    Args:
        layout: the run.
        number: the pipeline stage.
        exact: whether static memory is that of the whole model, to the byte, and experts are as many as they are;
            otherwise it is told by few layers and few experts.
    """
    settings, parallel = that_can_be_absent(layout.settings), layout.settings.parallel
    few, shapes = _fewer(layout, settings, number, exact=exact)
    with _rank_of(layout, number, few, shapes) as (session, trained):
        window = window_of(settings, trained[0], layout.rows)
        trace = partial(trace_stage, window=window, shapes=layout.shapes, parallel=parallel, stage=number)
        traced = [trace(model, layout.row, layout.mean_row, imbalance=layout.imbalance) for model in trained]
        per_window = traced[0][1]
        adapted = trained[0].adapters.parts if trained[0].adapters is not None else ()
        if not exact:
            held = _held(layout, number, session, trained)
            missing = _missing(trained[0].vlm, layout, number)
            experts = _experts_left_out(layout, number, trained, shapes)
    if exact:
        with _rank_of(layout, number, settings, layout.shapes) as (session, trained):
            held = _held(layout, number, session, trained)
    else:
        held = _told_by_two(layout, settings, number, held, missing, experts)
    operators = StageOperators({**per_window.parts, **held.update}, per_window.chunks)
    return Stage(held.static, [memory for memory, _ in traced], held.sampling, operators, window, adapted)


def _fewer(layout: Layout, settings: Settings, number: int, *, exact: bool, more: int = 0) -> tuple[Settings, Shapes]:
    few, shapes = fewer_layers(settings, layout.shapes, number, more=more)
    return few, shapes if exact else fewer_experts(shapes, settings.parallel)


class _Held(NamedTuple):
    """What a rank holds all the time, the bytes of the sampling, and the operators of an update."""

    static: StaticMemory
    sampling: int
    update: Mapping[str, Counts]


def _rank_of(
    layout: Layout, number: int, settings: Settings, shapes: Shapes
) -> AbstractContextManager[tuple[Session, list[TrainedModel]]]:
    """The first rank of a stage, with these settings and shapes."""
    return absent_rank(settings, layout.method, layout.rank(number), layout.world_size, at_end=True, shapes=shapes)


def _held(layout: Layout, number: int, session: Session, trained: Sequence[TrainedModel]) -> _Held:
    count, static = StaticCount(), StaticMemory()
    for model in trained:
        make_state(model.optimizers)
        static += count(model.vlm, model.optimizers)
    static += StaticMemory(others=further_memory(session, layout.settings, layout.method, layout.rank(number)))
    samples = METHODS[layout.verb].samples
    sampling = sampling_memory(session, layout.settings, layout.verb) if samples else 0
    return _Held(static, sampling, update_operators(trained[0].vlm, trained[0].optimizers, _META))


def window_of(settings: Settings, model: TrainedModel, rows: int) -> int:
    """The number of micro-batches whose frames are encoded together."""
    wanted = settings.vision.window or (rows if settings.train.global_batch_size is None else None)
    return min(rows, Step(model.vlm, model.optimizers, RowsAtHand(model.vlm, []), rows, model.objective, wanted).window)


def _missing(vlm: VLM, layout: Layout, number: int) -> tuple[int, int]:
    """How many layers the tower and each chunk of the decoder lack."""
    whole = layers_of(layout.settings.parallel, layout.shapes.text.layers, number)
    return layout.shapes.vision.layers - len(vlm.vision.layers), whole - len(vlm.language[0].decoder.layers)


def _experts_left_out(layout: Layout, number: int, trained: Sequence[TrainedModel], shapes: Shapes) -> StaticMemory:
    """What the experts hold that models with these shapes lack, on all layers."""
    moe, few, parallel = layout.shapes.text.moe, shapes.text.moe, layout.settings.parallel
    if moe is None or few is None:
        return StaticMemory()
    ranks = layout.world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor)
    layers, total = layers_of(parallel, layout.shapes.text.layers, number), StaticMemory()
    for chunk in (chunk for model in trained for chunk in model.vlm.language):
        times = (moe.num_experts / few.num_experts - 1) * layers / len(chunk.decoder.layers)
        experts = [weight for name, weight in chunk.decoder.named_parameters() if ".experts." in name]
        weights = round(times * sum(weight.nbytes for weight in experts))
        total += _with_state(weights, round(times * sum(4 * w.numel() for w in experts if w.requires_grad)), ranks)
    return total


def _with_state(weights: int, gradients: int, ranks: int) -> StaticMemory:
    """With a float32 copy and two moments, which so many ranks share."""
    return StaticMemory(weights, gradients, 3 * gradients // ranks)


def _told_by_two(
    layout: Layout, settings: Settings, number: int, few: _Held, missing: tuple[int, int], experts: StaticMemory
) -> _Held:
    """What all layers hold, from what ``few`` and one more in each chunk hold, the weights of a tower's layer, and
    the experts that are left out."""
    static, sampling = few.static, few.sampling
    if any(missing):
        one_more, shapes = _fewer(layout, settings, number, exact=False, more=1)
        with _rank_of(layout, number, one_more, shapes) as (session, trained):
            more = _held(layout, number, session, trained)
            of_layer = list(trained[0].vlm.vision.layers[-1].parameters()) if missing[1] else []
            weights = missing[0] * sum(weight.nbytes for weight in of_layer)
            gradients = missing[0] * sum(4 * weight.numel() for weight in of_layer if weight.requires_grad)
        times = missing[1] if missing[1] else missing[0]
        static = _with_state(weights, gradients, layout.world_size) + StaticMemory(
            *(_linear(getattr(few.static, f.name), getattr(more.static, f.name), times) for f in fields(StaticMemory))
        )
        sampling = min(_linear(few.sampling, more.sampling, times), int(layout.settings.rollout.cache_gib * 2**30))
    static += experts
    share = static.gradients / max(few.static.gradients, 1)
    update = {part: {call: count * share for call, count in counts.items()} for part, counts in few.update.items()}
    return _Held(static, sampling, update)


def _linear(few: int, more: int, times: int) -> int:
    return few + (more - few) * times
