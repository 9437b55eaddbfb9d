"""What a run was predicted to need and to take (``plan.json``, see ``log.plan``), beside what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megavlm.base.json_files import parse_json
from megavlm.base.number_format import number, percent, short
from megavlm.report.plan_memory import GIB
from megavlm.report.policy import is_rl
from megavlm.report.run import Run

FILE_NAME = "plan.json"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratio`` is measured / predicted."""

    name: str
    predicted: str
    measured: str
    ratio: str


@dataclass(frozen=True)
class Predictions:
    """A run's predictions for the report.

    Attributes:
        run: the name of the run.
        error: why there is no plan; "" if there is one.
        gpu, device: the GPU that was planned for, and what the run was on.
        mix, caveats: what the plan assumes.
        rows: the lines of the table.
    """

    run: str
    error: str = ""
    gpu: str = ""
    device: str = ""
    mix: str = ""
    caveats: str = ""
    rows: tuple[Row, ...] = ()


def predictions(run: Run) -> Predictions | None:
    """The predictions of a run; None if it was not planned, or is still being planned.

    On a CPU there is no measured memory: that of the whole process is nothing that a plan for a GPU could tell.
    """
    try:
        plan = parse_json((run.folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    try:
        return _compared(run, plan)
    except (LookupError, TypeError, AttributeError):
        return Predictions(run.name, error=f"{FILE_NAME} is damaged, or not a plan of this version")


def _compared(run: Run, plan: dict[str, Any]) -> Predictions:
    if "error" in plan:
        return Predictions(run.name, error=plan["error"])
    on_gpu = plan["device"] is not None
    peaks = [value for value in run.column("memory_gib") if value is not None]
    rows = [
        _row(
            "peak memory of rank 0, GiB", plan["stages"][0]["total"] / GIB, max(peaks, default=None) if on_gpu else None
        ),
        _row("seconds of a step", plan["time"]["seconds"], run.typical("seconds")),
        _row("tokens per second and GPU", plan["tokens_per_second"], _each(run, plan), short),
        _row("MFU", plan["mfu"], run.typical("mfu"), percent),
    ]
    if is_rl(run.lines):  # a plan knows the time of an update, and nothing of sampling
        rows = rows[:1]
    device = plan["device"] or "a CPU"
    return Predictions(run.name, "", plan["gpu"]["name"], device, plan["mix"], plan["caveats"], tuple(rows))


def _each(run: Run, plan: dict[str, Any]) -> float | None:
    """The measured tokens per second of one process."""
    speed = run.typical("tokens_per_second")
    return None if speed is None else speed / plan["world_size"]


def _row(name: str, predicted: float, measured: float | None, label: Callable[[float | None], str] = number) -> Row:
    ratio = None if measured is None or not predicted else measured / predicted
    return Row(name, label(predicted), label(measured), number(ratio, 3))
