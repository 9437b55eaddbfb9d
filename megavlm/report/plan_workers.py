"""The data workers of a plan in words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megavlm.base.number_format import counted, number

_MOST = 256  # workers that data.workers allows


class WorkersTold(NamedTuple):
    """What a plan says about data workers: how many are needed, and sentences that warn of too few."""

    needed: str
    warnings: list[str]


def workers_told(workers: Mapping[str, Any], step_seconds: float) -> WorkersTold:
    """What to say about the data workers.

    Args:
        workers: ``DataWorkers`` as a mapping, as in the JSON form of a plan.
        step_seconds: predicted seconds of a step, without waiting for rows.
    """
    needed, configured, speed = workers["needed"], workers["configured"], workers["speed"]
    text = (
        f"{counted(needed, 'data worker')} needed on each rank that loads data, for {counted(workers['rows'], 'row')} "
        f"of {number(speed['row_seconds'], 3)} s in a step; data.workers is {configured}. Measured: "
        f"{counted(speed['rows'], 'row')} by one worker on {speed['machine']} of {counted(speed['cores'], 'core')}"
    )
    warnings = []
    if configured < needed:
        slower = f"a step would take {number(workers['seconds'], 3)} s instead of {number(step_seconds, 3)} s"
        advice = f"set data.workers={needed}"
        if needed > _MOST:
            advice = f"at most {_MOST} are allowed, so make pictures smaller (data.max_pixels) or rows fewer per rank"
        warnings.append(f"data.workers is too small: {slower}, waiting for data; {advice}")
    if workers["cores"] is not None and workers["processes"] > workers["cores"]:
        warnings.append(
            f"a host has too few cores: {counted(workers['processes'], 'process', 'es')}, which are its ranks and the "
            f"needed workers of {workers['loading']} of them, on {counted(workers['cores'], 'core')}"
        )
    return WorkersTold(text, warnings)
