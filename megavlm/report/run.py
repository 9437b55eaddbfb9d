"""An output folder in a report: the settings and the metrics of its run."""

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.base.yaml_files import read_plain
from megavlm.media.access import MediaAccess
from megavlm.monitor.metrics import PARTS, read_metrics
from megavlm.report.loss_plot import HELD_OUT, smooth
from megavlm.report.preferences import HELD_OUT_SCORE, Preferences

# The settings that are used here and may not have another type: type → keys.
_TYPES = {
    dict: ("model", "data", "train", "train.unfreeze_after"),
    list: ("model.freeze", "data.media_roots", "data.media_protocols"),
    str: ("model.load", "model.adapter"),
}
_WORDS = {dict: "settings", list: "a list of names", str: "a path"}
_REPAIR = "repair the file, or move it away"


@dataclass
class Run:
    """The configuration and the metrics of a run, read from its output folder.

    Attributes:
        folder: the output folder.
        config: its config.yaml; {} if there is none.
        lines: its metrics, oldest first, perhaps with a line of step 0; [] if nothing was trained.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Reads an output folder.

        Raises UserError if config.yaml or metrics.jsonl cannot be read, or config.yaml has values of another type.
        """
        file = folder / "config.yaml"
        try:
            config = read_plain(file) if file.is_file() else None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if config is None:
            config = {}
        _check(config, file)
        lines = read_metrics(folder)
        return cls(folder, config, lines if any(map(of_a_step, lines)) else [])

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None if it is not set."""
        return _setting(self.config, key)

    @property
    def name(self) -> str:
        """The name in the report: the stage of pretraining, or the name of the folder."""
        stage = self.setting("stage")
        return self.folder.absolute().name if stage is None else f"stage {stage}"

    @property
    def access(self) -> MediaAccess:
        """Which media the records of its data may name."""
        return access_of(self.setting("data") or {})

    @property
    def trained_parts(self) -> list[str]:
        """The parts that are trained: those that are not frozen, or are unfrozen during the run."""
        frozen = set(self.setting("model.freeze") or []) - set(self.setting("train.unfreeze_after") or {})
        return [part for part in PARTS if part not in frozen]

    def column(self, name: str) -> list[float | None]:
        """One field of all lines; None for lines without it."""
        return [line.get(name) for line in self.lines]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps, without what was measured before the first one."""
        return [line for line in self.lines if of_a_step(line)]

    def total(self, name: str) -> float:
        """Sum of a field over all steps. If only each k-th step has a line, this line counts for k steps."""
        known, steps = [value for value in self.column(name) if value is not None], self.steps
        return sum(known) * steps[-1]["step"] / len(steps) if steps else 0.0

    def typical(self, name: str) -> float | None:
        """Median of a field. If there are several steps, the first is ignored, because it includes the start-up."""
        values = [line.get(name) for line in self.steps]
        known = [value for value in values[min(1, len(values) - 1) :] if value is not None]
        return median(known) if known else None

    def first_and_last(self, name: str) -> tuple[float | None, float | None]:
        """The first value of a field, and its moving average at the end; None if there are no values."""
        known = [value for value in self.column(name) if value is not None]
        return (known[0], smooth(known)[-1]) if known else (None, None)

    @property
    def first_and_last_loss(self) -> tuple[float | None, float | None]:
        """The first loss, and the moving average of the loss at the end."""
        return self.first_and_last("loss")

    @property
    def lowest_held_out_loss(self) -> tuple[float, int] | None:
        """The lowest loss on data.eval, and its step; None if it was not evaluated."""
        known = [(line[HELD_OUT], line["step"]) for line in self.lines if line.get(HELD_OUT) is not None]
        return min(known, default=None)

    @property
    def held_out_score(self) -> tuple[float, float, int] | None:
        """The first and the last mean score of held-out answers, and the step of the last; None without any."""
        known = [(value, line["step"]) for line in self.lines if (value := line.get(HELD_OUT_SCORE)) is not None]
        return (known[0][0], *known[-1]) if known else None

    @property
    def preferences(self) -> Preferences | None:
        """What accuracy and margin of this run are; None if it does not compare answers."""
        return Preferences.of(self.lines)


def _setting(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _check(config: Any, file: Path) -> None:
    """Raises UserError if the settings have types that no run has written: a report would fail somewhere else."""
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, not settings", _REPAIR)
    for kind, keys in _TYPES.items():
        for key in keys:
            value = _setting(config, key)
            of_names = not isinstance(value, list) or all(isinstance(name, str) for name in value)
            if value is not None and not (isinstance(value, kind) and of_names):
                raise UserError(f"{file}: {key} is {quoted(value)} instead of {_WORDS[kind]}", _REPAIR)


def of_a_step(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl tells of a step, and not of the weights before the first one."""
    return line["step"] > 0


def access_of(data: dict[str, Any]) -> MediaAccess:
    """Which media records may name, by the ``data`` section of a config.yaml."""
    roots = data.get("media_roots")
    return MediaAccess(tuple(roots) if roots else None, tuple(data.get("media_protocols") or ()))


def existing(path: Path, folder: Path) -> Path | None:
    """A path from the settings of a run, if it exists. It is relative to the folder in which the run was started.

    That folder is assumed to be the current folder, or a parent of the output folder.
    """
    starts = [Path.cwd(), *folder.absolute().parents]
    return next((start / path for start in starts if os.path.exists(start / path)), None)  # False if it is too long
