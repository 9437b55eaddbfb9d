"""How checks ended, and the table of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check.measure import Measure


@dataclass(frozen=True)
class Outcome:
    """How a check ended.

    Attributes:
        status: "ok", "skipped", "failed" or "stopped".
        seconds: how long it took.
        measures: what it reported, also before it failed.
        settings: what it ran with.
        error: why it did not end well.
    """

    status: str
    seconds: float
    measures: list[Measure]
    settings: dict[str, Any]
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 1),
            **({"error": self.error} if self.error else {}),
            "settings": self.settings,
            "measures": [measure.as_json() for measure in self.measures],
        }


def show(outcomes: Mapping[str, Outcome], *, judged: bool, console: Console | None = None) -> None:
    """Prints the table: a row for each measure, and one for each check that did not end well.

    Args:
        outcomes: by the names of the checks.
        judged: whether bounds mean something here.
        console: where to print; None: on the terminal.
    """
    console = console or Console()
    table = Table("check", "measure", "value", "bound", "", title="gpu-check")
    for name, outcome in outcomes.items():
        for measure in outcome.measures:
            table.add_row(name, measure.name, _value(measure), _bound(measure), _verdict(measure) if judged else "")
        if outcome.status != "ok":
            reason = outcome.error.strip().splitlines()
            table.add_row(name, reason[-1] if reason else "", "", "", outcome.status.upper())
        table.add_section()
    console.print(table)


def _value(measure: Measure) -> str:
    value = measure.value
    text = f"{value:.1%}" if measure.name.endswith("MFU") else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {measure.unit}".strip()


def _bound(measure: Measure) -> str:
    bounds = [(sign, bound) for sign, bound in (("≥", measure.least), ("≤", measure.most)) if bound is not None]
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds)


def _verdict(measure: Measure) -> str:
    return {True: "holds", False: "BROKEN", None: ""}[measure.holds]
