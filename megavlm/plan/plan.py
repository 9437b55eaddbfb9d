"""What a layout needs: the memory of each pipeline stage beside that of a GPU, and the operations and time of a step.

One rank of each pipeline stage is built without memory and runs a step (``absent_rank``, ``static_memory``,
``step_memory``, ``stage_operators``). Nothing is measured on a GPU here, and no constant is fitted.
"""

from dataclasses import dataclass

import torch

from megavlm.align.registry import METHODS, make_method
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.flops import parts_flops
from megavlm.model.shapes import Shapes
from megavlm.plan.absent_rank import TrainedModel, absent_rank, that_can_be_absent
from megavlm.plan.costs import costs_of
from megavlm.plan.gpus import Gpu
from megavlm.plan.hardware_flops import hardware_flops
from megavlm.plan.mix import Mix
from megavlm.plan.predict import step_time
from megavlm.plan.stage_operators import stage_operators
from megavlm.plan.static_memory import StaticCount, StaticMemory, make_state
from megavlm.plan.step_memory import Peak, RowsAtHand, peak_of, peak_of_window
from megavlm.plan.step_time import StepTime
from megavlm.runtime.session import Session, check_shapes
from megavlm.training.step import Step

SPARE = 0.05
"""Share of a GPU's memory that is left for what is not counted: CUDA, NCCL, workspaces, and gaps between tensors."""


@dataclass(frozen=True)
class StagePlan:
    """Bytes on the first rank of a pipeline stage.

    Attributes:
        stage, rank: the pipeline stage from 0, and the rank.
        static: what it holds all the time, of all models that are trained.
        peak: of the step's tensors, of the model that needs most.
    """

    stage: int
    rank: int
    static: StaticMemory
    peak: Peak

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.static.total + self.peak.total


@dataclass(frozen=True)
class Plan:
    """What a layout needs.

    Attributes:
        gpu: the GPU that is meant.
        world_size, data_parallel: number of GPUs, and of data-parallel ranks.
        mix, rows, tokens: what a step is assumed to contain: of each row, the number of rows, and of tokens.
        stages: the pipeline stages.
        model_flops, hardware_flops: operations of a step by part, without and with what is computed again.
        time: the time of a step, of the update of the main model alone.
        steps: number of steps of the run.
    """

    gpu: Gpu
    world_size: int
    data_parallel: int
    mix: Mix
    rows: int
    tokens: int
    stages: list[StagePlan]
    model_flops: dict[str, float]
    hardware_flops: dict[str, float]
    time: StepTime
    steps: int

    @property
    def capacity(self) -> int:
        """Bytes of a GPU's memory."""
        return round(self.gpu.memory_gib * 2**30)

    @property
    def spare(self) -> int:
        """Bytes that are left on the fullest stage, or that are missing if it is negative."""
        return self.capacity - max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether ``SPARE`` of the memory is left."""
        return self.spare >= SPARE * self.capacity


def make_plan(
    settings: Settings,
    shapes: Shapes,
    verb: str,
    world_size: int,
    gpu: Gpu,
    *,
    samples: int = 1,
    pictures: int | None = None,
) -> Plan:
    """Plans a layout.

    Args:
        settings: the settings of the run.
        shapes: the model's shapes.
        verb: a key of ``METHODS``.
        world_size: number of GPUs.
        gpu: the GPU.
        samples, pictures: see ``Mix.of``.

    Raises:
        UserError: the settings do not fit the model, the verb or the number of GPUs.
    """
    data_parallel = check_shapes(settings, shapes, world_size)
    method = make_method(verb, settings)
    answers = 2 if METHODS[verb].kind in ("pair", "judged") or METHODS[verb].samples else 1
    mix = Mix.of(settings, shapes, samples=samples, pictures=pictures, answers=answers)
    each = settings.rows_per_step(data_parallel)
    row, stages, operators = mix.row(settings, shapes), [], []
    absent = that_can_be_absent(settings)
    for stage in range(settings.parallel.pipeline):
        rank = world_size // settings.parallel.pipeline * stage
        with absent_rank(absent, method, rank, world_size, at_end=True) as (session, trained):
            count, static = StaticCount(), StaticMemory()
            for model in trained:
                make_state(model.optimizers)
                static += count(model.vlm, model.optimizers)
            peaks = [_peak(session, model, row, each) for model in trained]
            main, window = trained[0], _window(session, trained[0], each)
            operators.append(
                stage_operators(main.vlm, main.optimizers, main.objective, row, window, torch.device("meta"))
            )
        stages.append(StagePlan(stage, rank, static, max(peaks, key=lambda peak: peak.total)))
    rows = each * data_parallel
    work = mix.work(rows, scores=method.scores)
    steps = required(settings.train.steps, "train.steps")
    frozen, adapted = settings.frozen(steps), trained[0].adapters.parts if trained[0].adapters is not None else ()
    return Plan(
        gpu,
        world_size,
        data_parallel,
        mix,
        rows,
        int(work.tokens),
        stages,
        parts_flops(shapes, work, frozen, adapted),
        hardware_flops(shapes, work, settings, frozen, adapted),
        step_time(operators, settings, each, window, costs_of(gpu)),
        steps,
    )


def _peak(session: Session, model: TrainedModel, row: Row, rows: int) -> Peak:
    """The peak of a step of ``rows`` rows on each data-parallel rank."""
    parallel, window = session.settings.parallel, _window(session, model, rows)

    def run(count: int) -> Peak:
        where = next(model.vlm.vision.parameters()).device
        return peak_of(model.vlm, model.optimizers, model.objective, [row] * count, count, where)

    return peak_of_window(run, window, parallel.pipeline, parallel.virtual_pipeline or 1)


def _window(session: Session, model: TrainedModel, rows: int) -> int:
    """The number of micro-batches whose frames are encoded together."""
    settings, feed = session.settings, RowsAtHand(model.vlm, [])
    wanted = settings.vision.window or (rows if settings.train.global_batch_size is None else None)
    return min(rows, Step(model.vlm, model.optimizers, feed, rows, model.objective, wanted).window)
