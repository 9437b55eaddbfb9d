"""How many data workers have the rows of a step ready in its time."""

import math
from dataclasses import dataclass

from megavlm.config.settings import Settings
from megavlm.data.worker_speed import WorkerSpeed
from megavlm.plan.gpus import Gpu


@dataclass(frozen=True)
class DataWorkers:
    """The data workers of each rank that loads data: one of each data-parallel rank.

    Attributes:
        needed: how many make the rows of a step while the step before is computed.
        configured: ``data.workers``.
        rows: number of rows of a step on each such rank.
        seconds: of a step with the configured number, in which it waits for rows if they are too few.
        speed: that of one worker, as `megavlm data inspect` has measured it.
        loading: number of ranks that load data on the host that has most of them.
        processes: the needed workers of that host and its ranks, each of which is a process that uses a core.
        cores: of a host; None if it is not known.
    """

    needed: int
    configured: int
    rows: int
    seconds: float
    speed: WorkerSpeed
    loading: int
    processes: int
    cores: int | None


def data_workers(
    speed: WorkerSpeed,
    settings: Settings,
    *,
    rows: int,
    step_seconds: float,
    world_size: int,
    data_parallel: int,
    gpu: Gpu,
) -> DataWorkers:
    """The data workers of a run.

    A host has as many GPUs as NVLink connects. On it, ranks of one data-parallel rank stand beside each other, and all
    ranks that load data are in the first pipeline stage, whose ranks are the first of all.

    Args:
        speed: that of one worker.
        settings: those of the run.
        rows: number of rows of a step on each data-parallel rank.
        step_seconds: predicted seconds of a step.
        world_size, data_parallel: number of GPUs, and of data-parallel ranks.
        gpu: the GPU; ``cores`` are those of its host.
    """
    parallel, work = settings.parallel, rows * speed.row_seconds
    needed, configured = max(1, math.ceil(work / step_seconds)), settings.data.workers
    # Without workers, the training process makes the rows between two steps.
    seconds = max(step_seconds, work / configured) if configured else step_seconds + work
    of_host = min(world_size, gpu.nvlink_domain)
    loading = min(math.ceil(of_host / (parallel.tensor * parallel.context)), data_parallel)
    processes = of_host + loading * needed
    return DataWorkers(needed, configured, rows, seconds, speed, loading, processes, gpu.cores)
