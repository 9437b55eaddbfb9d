"""What a check reports: measures with their bounds, one JSON line each, so that what is known survives a failure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SKIPPED = 77  # exit status of the process of a check that cannot run here


class Skipped(Exception):
    """A check cannot run here; the text says why."""


@dataclass(frozen=True)
class Measure:
    """One number of a check.

    Attributes:
        name: what it is, unique within the check.
        value: the number.
        unit: its unit, "" for a ratio.
        least, most: the bounds that it must keep; None: no bound.
        note: how to read it.
    """

    name: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value keeps its bounds; None if it has none."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def as_json(self) -> dict[str, Any]:
        """The fields that are set, and whether the bounds are kept."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return fields if self.holds is None else {**fields, "holds": self.holds}


class Recorder:
    """Writes measures and settings of a check to a file, one JSON line each."""

    def __init__(self, path: Path):
        self._path = path

    def __call__(self, measure: Measure) -> None:
        """Writes a measure."""
        self._write({"measure": asdict(measure)})

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Writes what the check ran with; later entries are added to earlier ones."""
        self._write({"settings": settings})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_records(path: Path) -> tuple[list[Measure], dict[str, Any]]:
    """The measures and settings that a check has written until it ended, was stopped or died.

    A later measure of the same name replaces an earlier one.
    """
    measures, settings = dict[str, Measure](), dict[str, Any]()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        if "measure" in line:
            measures[line["measure"]["name"]] = Measure(**line["measure"])
        settings |= line.get("settings", {})
    return list(measures.values()), settings
