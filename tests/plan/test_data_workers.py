"""How many data workers a layout needs, and what is said about them, against values worked out by hand."""

from dataclasses import asdict, replace

import pytest

from megavlm.config.settings import Settings
from megavlm.data.worker_speed import WorkerSpeed
from megavlm.plan.data_workers import DataWorkers, data_workers
from megavlm.plan.gpus import gpu_of
from megavlm.report.plan_workers import workers_told

H100 = gpu_of("h100")
SPEED = WorkerSpeed(0.6, 20, "AMD EPYC", 2)


def found(workers: int = 2, cores: int | None = None, row_seconds: float = 0.6, **parallel: int) -> DataWorkers:
    """Of 16 GPUs, a step of 2 s, and 8 rows on each data-parallel rank."""
    settings = Settings(model={"hf": "none"}, data={"workers": workers}, parallel=parallel)
    model = parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1)
    sizes = {"rows": 8, "step_seconds": 2.0, "world_size": 16, "data_parallel": 16 // model}
    return data_workers(replace(SPEED, row_seconds=row_seconds), settings, **sizes, gpu=replace(H100, cores=cores))


def test_enough_workers_have_the_rows_ready_in_the_time_of_a_step() -> None:
    # 8 rows of 0.6 s are 4.8 s of work for the 2 s of a step: 2.4 workers.
    assert (found().needed, found().configured) == (3, 2)
    assert found(2).seconds == pytest.approx(2.4)  # two workers make 8 rows in 2.4 s
    assert found(3).seconds == 2.0
    assert found(0).seconds == pytest.approx(6.8)  # the training process itself makes them between the steps
    assert found(row_seconds=0.5).needed == 2  # 4 s of work, without a rest
    assert found(row_seconds=0.001).needed == 1


def test_ranks_that_load_data_stand_on_the_hosts_of_the_first_stage() -> None:
    # Of the eight ranks of a host: all; 0, 2, 4 and 6; 0, 4; 0 of each sixteen; and of two stages 0 to 7 are the first.
    assert found().loading == 8
    assert found(tensor=2).loading == 4
    assert found(tensor=2, context=2).loading == 2
    assert found(tensor=4, context=4).loading == 1
    assert found(pipeline=2).loading == 8
    assert found(pipeline=4).loading == 4  # ranks 0 to 3 are the first stage
    assert found(tensor=2).processes == 8 + 4 * 3


def test_what_is_said() -> None:
    needed, warnings = workers_told(asdict(found()), 2.0)
    assert needed == (
        "3 data workers needed on each rank that loads data, for 8 rows of 0.600 s in a step; data.workers is 2. "
        "Measured: 20 rows by one worker on AMD EPYC of 2 cores"
    )
    assert warnings == [
        "data.workers is too small: a step would take 2.40 s instead of 2.00 s, waiting for data; set data.workers=3"
    ]
    assert workers_told(asdict(found(3)), 2.0).warnings == []
    (none,) = workers_told(asdict(found(0)), 2.0).warnings
    assert "a step would take 6.80 s instead of 2.00 s" in none
    # Eight ranks of a host, and three workers of each, are 32 processes.
    assert workers_told(asdict(found(3, cores=32)), 2.0).warnings == []
    assert workers_told(asdict(found(3, cores=31)), 2.0).warnings == [
        "a host has too few cores: 32 processes, which are its ranks and the needed workers of 8 of them, on 31 cores"
    ]
    (most,) = workers_told(asdict(found(row_seconds=100.0)), 2.0).warnings  # 400 workers
    assert "set data.workers" not in most
    assert "at most 256 are allowed" in most
