"""The picture of a step's seconds by phase, for runs with log.phases."""

from collections.abc import Mapping
from statistics import mean

from markupsafe import Markup

from megavlm.base.number_format import number
from megavlm.charts.shares import shares_bar
from megavlm.report.run import RecordedRun

_COLORS: Mapping[str, str] = {
    "data": "lr", "sampling": "sampling", "reference": "faint", "tower": "vision", "exchange": "projector",
    "decoder": "language", "head": "loss", "reduction": "speed", "optimizer": "text", "other": "soft",
    "checkpoint": "mark",
}  # fmt: skip
PHASES = tuple(_COLORS)[:-1]  # those of ``monitor.phases``, which imports torch; a report is also written without it


def phases_bar(run: RecordedRun) -> Markup:
    """One bar with the mean seconds of each phase, and what checkpoints add between steps; empty without log.phases.

    The first line is left out if there are others, because it includes the start-up.
    """
    lines = [line for line in run.lines if f"phase/{PHASES[0]}" in line]
    lines = lines[1:] or lines
    if not lines:
        return Markup("")
    seconds = {name: mean(line.get(f"phase/{name}") or 0.0 for line in lines) for name in PHASES}
    every = (lines[-1]["step"] - lines[0]["step"]) / (len(lines) - 1) if len(lines) > 1 else 1
    seconds["checkpoint"] = mean(line.get("seconds_checkpoint") or 0.0 for line in lines) / every
    return shares_bar("Seconds of a step", seconds, _COLORS, lambda value: f"{number(value)} s", "mean")
