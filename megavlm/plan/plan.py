"""What a layout needs: the memory of each pipeline stage beside that of a GPU, and the operations and time of a step.

One rank of each pipeline stage is built without memory and runs a micro-batch (``stage``, ``trace``,
``static_memory``). Nothing is measured on a GPU here, and no constant is fitted.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megavlm.align.registry import METHODS, make_method
from megavlm.config.settings import Settings
from megavlm.model.flops import parts_flops
from megavlm.model.shapes import Shapes
from megavlm.plan.checkpoints import Checkpoint, checkpoint_of
from megavlm.plan.costs import costs_of
from megavlm.plan.data_workers import DataWorkers, data_workers
from megavlm.plan.gpus import Gpu
from megavlm.plan.hardware_flops import hardware_flops
from megavlm.plan.mix import DataMix, Mix
from megavlm.plan.predict import step_time
from megavlm.plan.rows import rows_of_rank
from megavlm.plan.stage import Layout, Stage, rough_stages_of, stages_of
from megavlm.plan.stage_memory import Moment, StageMemory
from megavlm.plan.step_memory import Peak
from megavlm.plan.step_time import StepTime
from megavlm.runtime.session import check_shapes
from megavlm.tracing.absent_rank import ALL_STEPS
from megavlm.tracing.balanced_experts import IMBALANCE
from megavlm.tracing.static_memory import StaticMemory

SPARE = 0.05
"""Share of a GPU's memory that is left for what is not counted: CUDA, NCCL, workspaces, and gaps between tensors."""

RAMPS = ("train.batch_ramp", "data.length_ramp", "train.unfreeze_after")
"""Settings that make the first steps of a run smaller."""

INTERLEAVED = (2, 4)
"""Numbers of chunks of a stage for which ``Plan.needs`` tells memory."""
Need = tuple[str, bool, int]


@dataclass(frozen=True)
class StagePlan:
    """Bytes on a rank of a pipeline stage: the fullest, if a server of vLLM is on one of them.

    Attributes:
        stage, rank: the pipeline stage from 0, and its first rank.
        static: what it holds at the fullest moment besides ``peak``: the loaded weights, or what a step begins with,
            without a critic that is in host memory.
        peak: of the step's tensors, of the model that needs most; or of another phase of the run that needs more.
        moments: the fullest moment of each phase of a run, of which the fullest has ``static`` and ``peak``.
        on_host: what is in host memory (``train.offload_optimizer`` and ``train.offload_activations``).
    """

    stage: int
    rank: int
    static: StaticMemory
    peak: Peak
    moments: list[Moment]
    on_host: int

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
        checkpoint: a checkpoint of the main model.
        steps: number of steps of the run; None if its length is given in epochs, or if the method samples.
        samples: whether the method samples its own answers. Rows and time are then those of a part of a step, an update
            by the main model, whose answers are assumed to be as long as those of the mix (``rows_of_rank``).
        workers: the data workers; None if it is not known how fast they are, or if the method samples its own answers.
        ramps: the names of settings that make the first steps smaller, of which the plan has the last ones.
        needs: bytes on the fullest stage with another ``train.recompute`` ("core_attn" or "none"), without
            ``vision.recompute`` if the second is false, and with a number of chunks of a stage: an estimate, in rough
            plans of one chunk in which all is computed again.
        kernels: whose activations are counted: those of ``te`` or of ``portable``.
    """

    gpu: Gpu
    world_size: int
    data_parallel: int
    mix: Mix | DataMix
    rows: int
    tokens: int
    stages: list[StagePlan]
    model_flops: dict[str, float]
    hardware_flops: dict[str, float]
    time: StepTime
    checkpoint: Checkpoint
    steps: int | None
    samples: bool = False
    workers: DataWorkers | None = None
    ramps: list[str] = field(default_factory=list)
    needs: dict[Need, int] = field(default_factory=dict)
    kernels: str = "portable"

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
    mix: Mix | DataMix,
    imbalance: float = IMBALANCE,
    exact: bool = True,
    processes: int = 1,
) -> Plan:
    """Plans a layout.

    Args:
        settings: the settings of the run.
        shapes: the model's shapes.
        verb: a key of ``METHODS``.
        world_size: number of GPUs.
        gpu: the GPU.
        mix: what the rows contain.
        imbalance: tokens of the busiest expert-parallel rank over their mean; it counts for the memory alone.
        exact: whether all stages are built, to the byte; otherwise two of them, with few layers.
        processes: number of processes that build them if ``exact``.

    Raises:
        UserError: the settings do not fit the model, the verb or the number of GPUs.
    """
    data_parallel = check_shapes(settings, shapes, world_size)
    method = make_method(verb, settings)
    each = rows_of_rank(settings, verb, mix, data_parallel)
    layout = Layout(settings, shapes, verb, world_size, mix, each, imbalance)
    limit = round((1 - SPARE) * gpu.memory_gib * 2**30)
    found = stages_of(layout, processes) if exact else rough_stages_of(layout, limit)
    stages = []
    for number, stage in enumerate(found):
        at = number, len(found)
        fullest, moments, on_host = stage.fullest(*at), stage.moments(*at), stage.on_host(*at)
        stages.append(StagePlan(number, layout.rank(number), *fullest, moments, on_host))
    rows = each * data_parallel
    work = mix.work(rows, scores=method.scores)
    frozen, adapted = settings.frozen(settings.train.steps or ALL_STEPS), found[0].adapted
    time = step_time([stage.operators for stage in found], settings, each, found[0].window, costs_of(gpu))
    samples, workers = METHODS[verb].samples, None
    if isinstance(mix, DataMix) and mix.speed and not samples:
        sizes = {"rows": each, "world_size": world_size, "data_parallel": data_parallel}
        workers = data_workers(mix.speed, settings, **sizes, step_seconds=time.seconds, gpu=gpu)
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
        time,
        checkpoint_of(settings, shapes, [stage.static for stage in found], world_size, gpu),
        None if samples else settings.train.steps,
        samples,
        workers,
        [name for name in RAMPS if operator.attrgetter(name)(settings)],
        {} if exact or not _computes_all_again(settings) else _needs(found, settings, layout.kernels),
        layout.kernels,
    )


def _computes_all_again(settings: Settings) -> bool:
    return settings.train.recompute == "full" and settings.parallel.virtual_pipeline is None


def _needs(stages: Sequence[Stage], settings: Settings, kernels: str) -> dict[Need, int]:
    """See ``Plan.needs``; attention alone is computed again with portable kernels only.

    Of the stages in the middle, which are alike, the first has most under way.
    """
    found: dict[Need, int] = {}
    last = len(stages) - 1
    numbers = sorted({0, min(1, last), last})
    recomputes_tower = settings.vision.recompute
    decoders = ["full", "core_attn", "none"] if kernels == "portable" else ["full", "none"]
    if settings.train.offload_activations:
        decoders = ["full"]
    forms = [(decoder, tower) for decoder in decoders for tower in {recomputes_tower, False}]
    for decoder, tower in forms:
        keep = partial(StageMemory.keeping, recompute=decoder, tower=recomputes_tower and not tower)
        kept = [stages[number].with_memories(keep) for number in numbers]
        for chunks in (1, *(INTERLEAVED if last else ())):
            each = kept
            if chunks > 1:
                window = max(kept[0].window // len(stages), 1) * len(stages)
                cut = partial(StageMemory.interleaved, chunks=chunks)
                each = [replace(stage.with_memories(cut), window=window) for stage in kept]
            full = [stage.fullest(number, len(stages)) for number, stage in zip(numbers, each, strict=True)]
            found[decoder, tower, chunks] = max(static.total + peak.total for static, peak in full)
    return found
