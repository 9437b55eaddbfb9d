"""What a run was predicted to need and to take (``plan.json``, see ``log.plan``), beside what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megavlm.base.json_files import parse_json
from megavlm.base.number_format import number, percent, short
from megavlm.monitor.metrics import MOST
from megavlm.report.plan_memory import GIB
from megavlm.report.policy import is_rl
from megavlm.report.run import RecordedRun

FILE_NAME = "plan.json"


@dataclass(frozen=True)
class Comparison:
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
    rows: tuple[Comparison, ...] = ()


def predictions(run: RecordedRun) -> Predictions | None:
    """The predictions of a run; None if it was not planned, or is still being planned.

    On a CPU there is no measured memory: that of the whole process is nothing that a plan for a GPU could tell.
    """
    try:
        plan = parse_json((run.folder / FILE_NAME).read_text(encoding="utf-8"))
        if "error" in plan:
            return Predictions(run.name, error=_text(plan["error"]))
        return _beside_measured(plan, run)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Predictions(run.name, error=f"{FILE_NAME} is damaged, or of another version")


def _beside_measured(plan: dict[str, Any], run: RecordedRun) -> Predictions:
    """What a plan predicts beside what was measured.

    Raises ValueError, LookupError or TypeError if the plan has values of another form.
    """
    device = None if plan["device"] is None else _text(plan["device"])
    gpu, mix, caveats = _text(plan["gpu"]["name"]), _text(plan["mix"], may_be_empty=True), plan["caveats"]
    stage = plan["stages"][0]  # loading is not measured; plans of older versions have no moments
    peak = max(_real(part["total"]) for part in stage.get("moments", [stage]) if part.get("name") != "load") / GIB
    seconds = _real(plan["time"]["seconds"])
    speed, mfu = _real(plan["tokens_per_second"]), None if plan["mfu"] is None else _real(plan["mfu"])
    if (world_size := _real(plan["world_size"])) < 1:
        raise ValueError("a plan for no rank")
    peaks = [value for value in run.column("memory_gib") if value is not None] if device is not None else []
    if run.setting("rollout.engine") == "vllm":  # the plan has its servers, and PyTorch's allocator has not
        peaks = []
    measured = run.typical("tokens_per_second")
    rows = [
        _row("peak memory of rank 0, GiB", peak, max(peaks, default=None)),
        _row("seconds of a step", seconds, run.typical("seconds")),
        _row("tokens per second and GPU", speed, None if measured is None else measured / world_size, short),
        _row("MFU", mfu, run.typical("mfu"), percent),
    ]
    if is_rl(run.lines):  # a plan knows the time of an update, and nothing of sampling
        rows = rows[:1]
    return Predictions(run.name, "", gpu, device or "a CPU", mix, _text(caveats, may_be_empty=True), tuple(rows))


def _text(value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise TypeError("not a text")
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST:
        raise TypeError("not a number")
    return value


def _row(
    name: str, predicted: float | None, measured: float | None, label: Callable[[float | None], str] = number
) -> Comparison:
    ratio = None if measured is None or not predicted else measured / predicted
    return Comparison(name, label(predicted), label(measured), number(ratio, 3))
