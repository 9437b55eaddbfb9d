"""What the first rank of each pipeline stage holds and computes: the facts from which a layout is planned."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

import torch

from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.plan.absent_rank import TrainedModel, absent_rank, that_can_be_absent
from megavlm.plan.stage_memory import StageMemory, trace_stage
from megavlm.plan.stage_operators import StageOperators, update_operators
from megavlm.plan.stand_in import fewer_layers, layers_of
from megavlm.plan.static_memory import StaticCount, StaticMemory, make_state
from megavlm.plan.step_memory import Peak, RowsAtHand
from megavlm.training.method import Method
from megavlm.training.step import Step

_META = torch.device("meta")


@dataclass(frozen=True)
class Layout:
    """A run on a cluster.

    Attributes:
        settings: the settings of the run.
        shapes: the model's shapes.
        method: the training method.
        world_size: number of GPUs.
        row, rows: each row, and their number in a step on a data-parallel rank.
    """

    settings: Settings
    shapes: Shapes
    method: Method
    world_size: int
    row: Row
    rows: int

    def rank(self, stage: int) -> int:
        """The first rank of a pipeline stage."""
        return self.world_size // self.settings.parallel.pipeline * stage


@dataclass(frozen=True)
class Stage:
    """The first rank of a pipeline stage.

    Attributes:
        static: what it holds all the time, of all models that are trained.
        memories: what is alive in a step, of each model that is trained.
        operators: what the main model computes.
        window: number of micro-batches whose frames are encoded together.
        adapted: the parts with adapters.
    """

    static: StaticMemory
    memories: list[StageMemory]
    operators: StageOperators
    window: int
    adapted: Collection[str]

    def peak(self, number: int, stages: int) -> Peak:
        """The fullest moment of a step, of the model that needs most, if this is stage ``number``."""
        peaks = [memory.peak(number, stages, self.window) for memory in self.memories]
        return max(peaks, key=lambda peak: peak.total)


def stages_of(layout: Layout, *, exact: bool = True) -> list[Stage]:
    """All stages. Those in the middle are alike, so one of them is built."""
    found: list[Stage] = []
    stages = layout.settings.parallel.pipeline
    levels = len(layout.shapes.vision.deepstack_layers)
    middle_is_plain = layers_of(layout.settings.parallel, layout.shapes.text.layers, 0) >= levels
    for number in range(stages):
        is_known = 2 <= number < stages - 1 and middle_is_plain
        found.append(found[-1] if is_known else stage_of(layout, number, exact=exact))
    return found


def stage_of(layout: Layout, number: int, *, exact: bool = True) -> Stage:
    """Builds the first rank of a stage and lets it run.

    Args:
        layout: the run.
        number: the pipeline stage.
        exact: whether static memory is that of the whole model, to the byte; otherwise it is told by few layers.
    """
    settings, rank = that_can_be_absent(layout.settings), layout.rank(number)
    few, shapes = fewer_layers(settings, layout.shapes)
    parallel = settings.parallel
    with absent_rank(few, layout.method, rank, layout.world_size, at_end=True, shapes=shapes) as (_, trained):
        window = window_of(settings, trained[0], layout.rows)
        traced = [trace_stage(model, layout.row, window, layout.shapes, parallel, number) for model in trained]
        adapted = trained[0].adapters.parts if trained[0].adapters is not None else ()
        if not exact:
            static, update = _static(trained), update_operators(trained[0].vlm, trained[0].optimizers, _META)
            missing = [_missing(model.vlm, layout, number) for model in trained]
    if exact:
        with absent_rank(settings, layout.method, rank, layout.world_size, at_end=True, shapes=layout.shapes) as (
            _,
            trained,
        ):
            static, update = _static(trained), update_operators(trained[0].vlm, trained[0].optimizers, _META)
    elif any(missing[0]):
        little, static = static, _told_by_two(layout, settings, number, static, missing[0])
        more = static.gradients / max(little.gradients, 1)
        update = {part: {call: count * more for call, count in counts.items()} for part, counts in update.items()}
    operators = StageOperators({**traced[0][1].parts, **update}, traced[0][1].chunks)
    return Stage(static, [memory for memory, _ in traced], operators, window, adapted)


def window_of(settings: Settings, model: TrainedModel, rows: int) -> int:
    """The number of micro-batches whose frames are encoded together."""
    wanted = settings.vision.window or (rows if settings.train.global_batch_size is None else None)
    return min(rows, Step(model.vlm, model.optimizers, RowsAtHand(model.vlm, []), rows, model.objective, wanted).window)


def _static(trained: Iterable[TrainedModel]) -> StaticMemory:
    count, static = StaticCount(), StaticMemory()
    for model in trained:
        make_state(model.optimizers)
        static += count(model.vlm, model.optimizers)
    return static


def _missing(vlm: VLM, layout: Layout, number: int) -> tuple[int, int]:
    """How many layers the tower and each chunk of the decoder lack."""
    whole = layers_of(layout.settings.parallel, layout.shapes.text.layers, number)
    return layout.shapes.vision.layers - len(vlm.vision.layers), whole - len(vlm.language[0].decoder.layers)


def _told_by_two(
    layout: Layout, settings: Settings, number: int, few: StaticMemory, missing: tuple[int, int]
) -> StaticMemory:
    """What all layers hold, from what ``few`` and one more in each chunk hold, and the weights of a tower's layer."""
    one_more, shapes = fewer_layers(settings, layout.shapes, more=1)
    with absent_rank(one_more, layout.method, layout.rank(number), layout.world_size, at_end=True, shapes=shapes) as (
        _,
        trained,
    ):
        more = _static(trained)
        of_layer = list(trained[0].vlm.vision.layers[-1].parameters()) if missing[1] else []
        weights = missing[0] * sum(weight.nbytes for weight in of_layer)
        gradients = missing[0] * sum(4 * weight.numel() for weight in of_layer if weight.requires_grad)
    times = missing[1] if missing[1] else missing[0]
    tower = StaticMemory(weights, gradients, 3 * gradients // layout.world_size)  # a float32 copy and two moments
    return tower + StaticMemory(
        *(getattr(few, f.name) + (getattr(more, f.name) - getattr(few, f.name)) * times for f in fields(few))
    )
