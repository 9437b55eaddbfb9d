"""Follows metrics.jsonl of a run that is being written, perhaps by another machine on a shared disk.

Only what is new is read. If the file is another one or shorter than before, as after a restart or when a run goes on
from a checkpoint, it is read again from its beginning.
"""

import math
import os
import re
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.number_format import counted, number
from megavlm.base.yaml_files import read_plain
from megavlm.monitor.expert_metrics import FILE_NAME as EXPERTS
from megavlm.monitor.metrics import FILE_NAME, MOST_STEPS
from megavlm.monitor.rl_warnings import RlWarnings
from megavlm.report.run_data import changes_of

_TAIL = 64  # bytes before the place up to which was read; if they have changed, the file is another one
_MOST_NOTES = 8
_RECENT = 20  # steps from which the remaining time is estimated


@dataclass(frozen=True)
class Points:
    """A curve: the mean of each few values, at the step of the last one, and their extremes; all of the same length."""

    steps: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]


class FollowedRun:
    """The metrics of one output folder.

    Args:
        folder: the output folder; its metrics.jsonl may be missing as yet.
        name: what the run is called.

    Attributes:
        version: changes whenever a line is added or the file is read anew.
        steps: the step of each line.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self._path = folder, name, folder / FILE_NAME
        self._generation, self._configured = 0, -1.0
        self._total: Any = None
        self._trouble = ""  # why the file could not be read the last time
        self._forget()

    def _forget(self) -> None:
        self._generation += 1
        self._place, self._tail, self._changed = 0, b"", 0.0
        self._identity: tuple[int, int] | None = None
        self.steps = array("q")
        self._columns: dict[str, array] = {}
        self._warnings = RlWarnings()
        self._notes: list[tuple[int, str]] = []  # with their steps
        self._damaged = 0  # lines that are no metrics of a step

    @property
    def version(self) -> tuple[int, int]:
        return self._generation, len(self.steps)

    def read(self) -> None:
        """Reads the complete lines that have been added.

        A file that cannot be read now is tried again next time; until then, ``notes`` says why.
        """
        self._trouble = ""
        try:
            found = os.stat(self._path)
            identity = found.st_dev, found.st_ino
            if found.st_size == self._place and identity == self._identity:
                return
            with self._path.open("rb") as file:
                file.seek(self._place - len(self._tail))
                if file.read(len(self._tail)) != self._tail:  # a new file may have the number and length of the old one
                    self._forget()
                    file.seek(0)
                text = file.read()
        except FileNotFoundError:
            if self._place:
                self._forget()
            return
        except OSError as error:
            self._trouble = f"{FILE_NAME} cannot be read: {error.strerror}"
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._identity, self._changed = identity, found.st_mtime
        self._place += len(whole)
        self._tail = (self._tail + whole)[-_TAIL:]
        for raw in filter(bytes.strip, whole.splitlines()):
            self._take(raw)

    def _take(self, raw: bytes) -> None:
        try:
            line = parse_json(raw)
        except ValueError:
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MOST_STEPS:
            self._damaged += 1
            return
        count = len(self.steps)
        self.steps.append(step)
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and abs(value) < math.inf:
                column = self._columns.setdefault(name, array("d"))
                column.extend([math.nan] * (count - len(column)))  # of lines without this field
                column.append(_as_float(value))
        if line.get("skipped"):
            self._notes.append((step, f"step {step} was skipped: its loss or a gradient was NaN or infinite"))
        with suppress(TypeError, ValueError, ArithmeticError, KeyError):  # of fields that are no numbers
            self._notes += [(step, str(warning)) for warning in self._warnings.take(line)]
        del self._notes[:-_MOST_NOTES]

    @property
    def fields(self) -> list[str]:
        """The names of the fields that have numbers."""
        return list(self._columns)

    def last(self, field: str) -> float | None:
        """The newest value of a field; None if the newest line has none."""
        column = self._columns.get(field)
        return column[-1] if column and len(column) == len(self.steps) else None

    def points(self, field: str, most: int) -> Points:
        """The curve of a field with about ``most`` points at most."""
        points = Points([], [], [], [])
        column = self._columns.get(field, array("d"))
        size = max(math.ceil(len(column) / most), 1)
        for start in range(0, len(column), size):
            known = [value for value in column[start : start + size] if not math.isnan(value)]
            if known:
                points.steps.append(self.steps[min(start + size, len(column)) - 1])
                points.means.append(math.fsum(known) / len(known))
                points.lows.append(min(known))
                points.highs.append(max(known))
        return points

    @property
    def total(self) -> int | None:
        """``train.steps`` of config.yaml; None if it is not known."""
        path = self.folder / "config.yaml"
        try:
            changed = path.stat().st_mtime
            if changed != self._configured:
                self._total, self._configured = read_plain(path)["train"]["steps"], changed
        except (OSError, UserError, KeyError, TypeError):
            return None
        return self._total if isinstance(self._total, int) else None

    @property
    def seconds_ago(self) -> float | None:
        """How long ago the newest line was written, by the clocks of this machine and of the disk; None without any."""
        return max(time.time() - self._changed, 0.0) if self.steps else None

    @property
    def seconds_left(self) -> float | None:
        """The estimated time until the last step, from the newest steps; None if it is not known."""
        recent = [value for value in self._columns.get("seconds", ())[-_RECENT:] if not math.isnan(value)]
        if not recent or self.total is None:
            return None
        return max(self.total - self.steps[-1], 0) * median(recent)

    @property
    def experts_changed(self) -> float:
        """When the file with the loads of the experts was written (``expert_load.json``); 0.0 if there is none."""
        try:
            return (self.folder / EXPERTS).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def notes(self) -> list[str]:
        """The newest warnings, skipped steps and changes of settings, oldest first; then what cannot be read."""
        changes = [
            (change["step"], f"continued after step {change['step']} with {change['setting']} {change['new']}")
            for change in changes_of(self.folder)
            if isinstance(change["step"], int)
        ]
        told = sorted([*self._notes, *changes], key=lambda note: note[0])
        notes = [text for _, text in told[-_MOST_NOTES:]]
        if self._damaged:
            notes.append(f"{counted(self._damaged, 'line')} of {FILE_NAME} left out: damaged, or without a step")
        return notes + [self._trouble] * bool(self._trouble)

    def facts(self) -> dict[str, Any]:
        """What is said of the run beside its curves."""
        return {
            "name": self.name, "folder": str(self.folder), "step": self.steps[-1] if self.steps else None,
            "total": self.total, "ago": self.seconds_ago, "left": self.seconds_left, "notes": self.notes,
            "loss": _told(self.last("loss")),
            "reward": _told(self.last("reward")),
        }  # fmt: skip


def _told(value: float | None) -> str | None:
    return None if value is None or not math.isfinite(value) else number(value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def find_runs(folders: Sequence[Path]) -> list[FollowedRun]:
    """The runs of output folders; of a folder that has no run, those of the folders in it.

    Raises UserError if a folder does not exist.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder", "give the output folder of a run, or a folder with several")
        inner = sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}"))
        found += [folder] if not inner or _is_run(folder) else inner
    found = list(dict.fromkeys(found))
    return [FollowedRun(folder, name) for folder, name in zip(found, _names(found), strict=True)]


def _is_run(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() or (folder / "config.yaml").exists()


def _names(folders: Sequence[Path]) -> Iterable[str]:
    """The shortest ends of the paths, in whole names, that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def sorted_fields(fields: Iterable[str]) -> list[str]:
    """Fields by how much they are worth a look: those of ``MAIN`` first, in its order, then the others by name."""
    known = sorted(set(fields))
    first = [name for main in MAIN for name in known if re.fullmatch(main, name)]
    return [*first, *(name for name in known if name not in first)]


def is_main(field: str) -> bool:
    """Whether a field is one of ``MAIN``."""
    return any(re.fullmatch(main, field) for main in MAIN)


# What is shown unless something else is asked for: names of fields, or patterns of whole names, in JavaScript's
# notation, too. Of several held-out sources, each has its loss and its score; the other fields can be chosen.
MAIN = (
    *("loss", "eval/loss", "eval/.+/loss", "eval/answers/score", "eval/.+/answers/score"),
    *("reward", "accuracy", "eval/(.+/)?accuracy", "margin", "eval/(.+/)?margin"),
    *("kl", "lr", "grad_norm", "tokens_per_second"),
)
