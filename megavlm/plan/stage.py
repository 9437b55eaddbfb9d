"""What the first rank of each pipeline stage holds and computes: the facts from which a layout is planned."""

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from megavlm.align.registry import METHODS, make_method
from megavlm.base.pools import in_processes
from megavlm.checkpoint.optimizer_state import made_when_saved
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.shapes import Shapes
from megavlm.plan.all_layers import Held, of_all_layers
from megavlm.plan.further_memory import further_memory, sampling_memory, server_among
from megavlm.plan.mix import DataMix, Mix
from megavlm.plan.stage_memory import Moment, StageMemory
from megavlm.plan.stage_operators import StageOperators, update_operators
from megavlm.plan.step_memory import Peak, RowsAtHand
from megavlm.plan.trace import trace_stage
from megavlm.runtime.feed import window_size
from megavlm.runtime.session import Session
from megavlm.tracing.absent_rank import TrainedModel, absent_rank, that_can_be_absent
from megavlm.tracing.stand_in import fewer_experts, fewer_layers, layers_of
from megavlm.tracing.static_memory import StaticCount, StaticMemory, make_state
from megavlm.training.method import Method
from megavlm.training.step import Step

_META = torch.device("meta")
FREE_MEMORY = "end other programs, which need memory too, and run the same command again"


def kernels_on_gpus(settings: Settings) -> str:
    """What ``kernels.resolve`` returns in a run on GPUs with Transformer Engine: ``te`` or ``portable``."""
    if settings.model.kernels != "auto":
        return settings.model.kernels
    return "portable" if settings.train.precision == "fp32" else "te"


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

    @property
    def kernels(self) -> str:
        """See ``kernels_on_gpus``."""
        return kernels_on_gpus(self.settings)

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

    def ranks(self, first: int, last: int | None = None) -> range:
        """All ranks of a pipeline stage, or of several."""
        return range(self.rank(first), self.rank((first if last is None else last) + 1))


@dataclass(frozen=True)
class Stage:
    """The first rank of a pipeline stage.

    Attributes:
        each: what it holds of each model that is trained, the first with all that is not trained.
        parked: whether the others are in host memory while the first one learns or samples (``align.offload``).
        memories: what is alive in a step, of each model that is trained.
        loaded: bytes of the weights of these models when they have been loaded, before anything else is made.
        sampling: bytes of the sampling, which comes before the step.
        updating, saving: bytes that the update of the weights and a checkpoint make.
        operators: what the main model computes.
        window: number of micro-batches whose frames are encoded together.
        adapted: the parts with adapters.
    """

    each: Sequence[StaticMemory]
    parked: bool
    memories: list[StageMemory]
    loaded: int
    sampling: int
    updating: int
    saving: int
    operators: StageOperators
    window: int
    adapted: Collection[str]

    @property
    def static(self) -> StaticMemory:
        """What it holds of all models together."""
        return sum(self.each, StaticMemory())

    def fullest(self, number: int, stages: int) -> tuple[StaticMemory, Peak]:
        """The fullest moment of all, if this is stage ``number``: what the rank holds then, and what it makes."""
        fullest = max(self.moments(number, stages), key=lambda moment: moment.total)
        return fullest.static, fullest.peak

    def moments(self, number: int, stages: int) -> list[Moment]:
        """The fullest moment of each phase of a run, in their order, if this is stage ``number``.

        All models are there for a checkpoint. Its tensors are copied to host memory; on the device it makes a buffer,
        in which pieces that other data-parallel ranks have are received.
        """
        alone = self.each[0] if self.parked else self.static  # beside the first model
        found = [Moment("load", StaticMemory(self.loaded), Peak("load", {}))]
        if self.sampling:
            found.append(Moment("sampling", alone, Peak("sampling", {"sampling": self.sampling})))
        held = [alone] + [self.static] * (len(self.memories) - 1)
        peaks = [memory.peaks(number, stages, self.window) for memory in self.memories]
        for name in peaks[0]:
            of_models = [Moment(name, static, of[name]) for static, of in zip(held, peaks, strict=True)]
            found.append(max(of_models, key=lambda moment: moment.total))
        found.append(Moment("update", held[-1], Peak("optimizer", {"optimizer": self.updating})))
        return [*found, Moment("checkpoint", self.static, Peak("checkpoint", {"checkpoint": self.saving}))]

    def on_host(self, number: int, stages: int) -> int:
        """Bytes in host memory, if this is stage ``number``: Adam's state, and the inputs of layers of each model."""
        inputs = sum(memory.on_host(number, stages, self.window) for memory in self.memories)
        return self.static.on_host + inputs

    def with_memories(self, change: Callable[[StageMemory], StageMemory]) -> "Stage":
        """The same with another memory of a step. The operators stay as they are."""
        return replace(self, memories=[change(memory) for memory in self.memories])


def stages_of(layout: Layout, processes: int = 1) -> list[Stage]:
    """All stages. Those in the middle are alike but for a server of vLLM, so one of them is built, or two.

    Args:
        layout: the run.
        processes: number of processes that build them.
    """
    stages = layout.settings.parallel.pipeline
    levels = len(layout.shapes.vision.deepstack_layers)
    middle_is_plain = layers_of(layout.settings.parallel, layout.shapes.text.layers, 0) >= levels
    alike, of_kind = [], dict[bool, int]()  # the first stage in the middle with a server, and without one
    for number in range(stages):
        if 0 < number < stages - 1 and middle_is_plain:
            alike.append(of_kind.setdefault(server_among(layout.settings, layout.ranks(number)), number))
        else:
            alike.append(number)
    found = dict(zip(dict.fromkeys(alike), _built(layout, list(dict.fromkeys(alike)), processes), strict=True))
    return [found[number] for number in alike]


def stage_of(layout: Layout, number: int) -> Stage:
    """Builds the first rank of a stage and lets it run. What it holds is that of the whole model, to the byte."""
    return _built(layout, [number], 1)[0]


def _built(layout: Layout, numbers: Sequence[int], processes: int) -> list[Stage]:
    """Stages by number. Each is built twice: with few layers, which run, and with all of them, which are counted."""
    settings, parallel = that_can_be_absent(layout.settings), layout.settings.parallel
    if processes > 1:
        torch.set_num_threads(1)  # processes that are forked must not wait for threads that they do not have

    def traced(number: int) -> _Traced:
        few, shapes = fewer_layers(settings, layout.shapes, number)
        with _rank_of(layout, number, few, fewer_experts(shapes, parallel)) as (_, trained):
            return _traced(layout, number, trained, layout.imbalance)

    def held(number: int) -> Held:
        with _rank_of(layout, number, settings, layout.shapes) as (session, trained):
            return _held(layout, session, trained, layout.ranks(number))

    builds = [[partial(build, number) for number in numbers] for build in (traced, held)]
    if processes > len(builds):
        builds = [[build] for build in itertools.chain(*builds)]
    # With two processes, each has builds that are alike: it knows most of what they compute from its first one.
    found: list[Any] = list(
        itertools.chain.from_iterable(
            in_processes(lambda at: [build() for build in builds[at]], len(builds), processes, "planning", FREE_MEMORY)
        )
    )
    return [_stage(layout, *both) for both in zip(found[: len(numbers)], found[len(numbers) :], strict=True)]


def rough_stages_of(layout: Layout, limit: int) -> list[Stage]:
    """All stages, told by the first and the last one, with few layers and few experts.

    Args:
        layout: the run.
        limit: if the first stage needs more bytes than this, it stands for the last one, too.
    """
    stages = layout.settings.parallel.pipeline
    first, *middle = _rough(layout, 0)
    if stages == 1 or sum(part.total for part in first.fullest(0, stages)) > limit:
        return [first] * stages
    return [first] + middle * (stages - 2) + _rough(layout, stages - 1)


def _rough(layout: Layout, number: int) -> list[Stage]:
    """A stage; if it is the first one, then also one of those between it and the last one.

    A stage in the middle may have more layers. The trace has as many, and the first stage's features are left out.
    """
    has_middle = number == 0 and layout.settings.parallel.pipeline > 2
    built = _with_stages_alike(layout) if has_middle else layout
    settings = that_can_be_absent(built.settings)
    few, shapes = fewer_layers(settings, built.shapes, number, rough=True)
    with _rank_of(layout, number, few, fewer_experts(shapes, settings.parallel)) as (session, trained):
        busiest = layout.imbalance if number == 0 else None  # the last one has one micro-batch at a time
        traced = _traced(built, number, trained, busiest)
        ranks = layout.ranks(0, settings.parallel.pipeline - 2) if has_middle else layout.ranks(number)
        held = _held(layout, session, trained, ranks)
        whole = partial(of_all_layers, held, trained, layout.settings, layout.shapes, layout.world_size)
        found = [_stage(layout, traced, whole(number))]
        if has_middle:
            middle = _stage(layout, traced, whole(1))
            found.append(replace(middle, memories=[memory.without("exchange") for memory in middle.memories]))
    return found


def _with_stages_alike(layout: Layout) -> Layout:
    """The layout with as many layers on each stage as on those in the middle."""
    parallel, text = layout.settings.parallel, layout.shapes.text
    layers = layers_of(parallel, text.layers, 1) * (parallel.virtual_pipeline or 1) * parallel.pipeline
    even = parallel.model_copy(update={"first_stage_layers": None, "last_stage_layers": None})
    shapes = replace(layout.shapes, text=replace(text, layers=layers))
    return replace(layout, settings=layout.settings.model_copy(update={"parallel": even}), shapes=shapes)


class _Traced(NamedTuple):
    """What a window does on a rank; see ``Stage``."""

    memories: list[StageMemory]
    operators: StageOperators
    window: int
    adapted: Collection[str]


def _traced(layout: Layout, number: int, trained: Sequence[TrainedModel], imbalance: float | None) -> _Traced:
    """Lets a rank run that has few of the layers of stage ``number``; see ``trace_stage`` for ``imbalance``."""
    window = window_of(layout.settings, trained[0], layout.rows)
    trace = partial(trace_stage, window=window, shapes=layout.shapes, parallel=layout.settings.parallel, stage=number)
    trace = partial(trace, fused=layout.settings if layout.kernels == "te" else None)
    found = [trace(model, layout.row, layout.mean_row, imbalance=imbalance) for model in trained]
    adapted = trained[0].adapters.parts if trained[0].adapters is not None else ()
    return _Traced([memory for memory, _ in found], found[0][1], window, adapted)


def _stage(layout: Layout, traced: _Traced, held: Held) -> Stage:
    operators = StageOperators({**traced.operators.parts, **held.update}, traced.operators.chunks)
    parked = "critic" in layout.settings.align.offload
    moments = held.loaded, held.sampling, held.updating, held.saving
    return Stage(held.each, parked, traced.memories, *moments, operators, traced.window, traced.adapted)


def _rank_of(
    layout: Layout, number: int, settings: Settings, shapes: Shapes
) -> AbstractContextManager[tuple[Session, list[TrainedModel]]]:
    """The first rank of a stage, with these settings and shapes."""
    return absent_rank(settings, layout.method, layout.rank(number), layout.world_size, at_end=True, shapes=shapes)


def _held(layout: Layout, session: Session, trained: Sequence[TrainedModel], ranks: range) -> Held:
    """What the fullest of some ranks holds, if this is one of them."""
    count, each = StaticCount(), []
    for model in trained:
        make_state(model.optimizers)
        each.append(count(model.vlm, model.optimizers))
    each[0] += StaticMemory(others=further_memory(session, layout.settings, layout.method, ranks))
    samples = METHODS[layout.verb].samples
    sampling = sampling_memory(session, layout.settings, layout.verb) if samples else 0
    loaded = trained[0].loaded + sum(static.weights for static in each[1:])
    (update, updating), *others = [update_operators(model.vlm, model.optimizers, _META) for model in trained]
    saving = max(made_when_saved(model.optimizers) for model in trained)  # one model after the other
    return Held(each, loaded, sampling, max([updating, *(size for _, size in others)]), saving, update)


def window_of(settings: Settings, model: TrainedModel, rows: int) -> int:
    """The number of micro-batches whose frames are encoded together."""
    wanted, feed = window_size(settings), RowsAtHand(model.vlm, [])
    return min(rows, Step(model.vlm, model.optimizers, feed, rows, model.objective, wanted).window)
