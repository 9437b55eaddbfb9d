"""What is known of exported weights: the run that trained them, up to their step, and the model it started from."""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megavlm import __version__
from megavlm.align.registry import METHODS, trained_by
from megavlm.base import machine
from megavlm.base.errors import UserError
from megavlm.config import describe
from megavlm.config.load import load_settings
from megavlm.config.settings import Settings
from megavlm.output.changes import flat
from megavlm.report.run import RecordedRun
from megavlm.report.run_data import passes_of
from megavlm.report.run_report import follow

# Settings that say nothing of the model: places, what has its own section in the card, and how the work was organised.
_UNTOLD = ("model.hf", "model.load", "model.adapter", "output", "overwrite", "data.train", "data.eval", "data.workers",
           "data.media_roots", "data.media_protocols", "data.replay.sources", "log", "checkpoint", "generate",
           "rollout.vllm", "reward_pool", "stage", "train.steps", "train.memory_check", "align.reference",
           "align.critic.load")  # fmt: skip
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's cache
_LICENSE = re.compile(r"^license:[ \t]*([\w.+-]+)[ \t]*$", re.MULTILINE)
_PACKAGES = ("torch", "transformers", "megatron-core", "peft")


@dataclass(frozen=True)
class UsedSource:
    """A source of training data, up to the exported step: samples in rows, their targets, and passes over it."""

    name: str
    samples: float
    target_tokens: float
    passes: float


class RunFacts:
    """A run up to the step whose weights are exported.

    Args:
        folder: the output folder of the run, which may go on.
        step: the step.
    Attributes:
        run: its settings and its metrics up to that step.

    Raises:
        UserError: its files cannot be read.
    """

    def __init__(self, folder: Path, step: int) -> None:
        read = RecordedRun.read(folder)
        self.run = RecordedRun(folder, read.config, [line for line in read.lines if line["step"] <= step])
        self.step = step

    @property
    def verb(self) -> str:
        """The verb that trained, as the settings and the fields of the metrics tell."""
        return _verb_of(self.run)

    @property
    def method(self) -> str:
        """The verb in words."""
        stage = self.run.setting("stage")
        return METHODS[self.verb].named + (f", stage {stage}" if stage is not None else "")

    @property
    def before(self) -> list[str]:
        """The verbs of the runs that it started from, oldest first, as far as their folders can be read."""
        return [_verb_of(run) for run in self._chain[0][:-1] if run.lines]

    @property
    def left_out(self) -> list[str]:
        """Why a run that it started from cannot be read; [] if all can. What came before that one is not known."""
        return self._chain[1]

    @cached_property
    def _chain(self) -> tuple[list[RecordedRun], list[str]]:
        left_out: list[str] = []
        return follow(self.run.folder, left_out), left_out

    @property
    def is_exact(self) -> bool:
        """Whether the metrics have a line for each step, so that sums over them are no estimates."""
        return len(self.run.steps) == self.step

    @cached_property
    def sources(self) -> list[UsedSource]:
        """The sources that samples came from, those with the most samples first."""
        passes = passes_of(self.run.lines)
        if len(passes) == 1:  # the counts of an only source are those of the steps
            ((name, made),) = passes.items()
            return [UsedSource(name, self.run.total("samples"), self.run.total("target_tokens"), made)]
        total = lambda field, name: RecordedRun(self.run.folder, {}, _zeros(self.run.lines, f"{field}/{name}")).total(
            f"{field}/{name}"
        )
        found = [UsedSource(n, total("samples", n), total("target_tokens", n), made) for n, made in passes.items()]
        return sorted(found, key=lambda source: (-source.samples, source.name))

    @cached_property
    def settings(self) -> dict[str, str]:
        """The settings that differ from their defaults and say something of the model; paths by their last part."""
        try:
            settings = load_settings(self.run.folder / "config.yaml")
        except UserError:  # of an older version
            return {}
        model = settings.model_dump(mode="json", by_alias=True)
        plain = Settings.model_validate({"model": {"hf": "none"}}).model_dump(mode="json", by_alias=True)
        defaults, changed = flat(plain), {}
        for key, value in flat(model).items():
            told = not any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in _UNTOLD)
            if told and value is not None and value != defaults.get(key):
                changed[key] = describe.value_text(_public(value))
        if settings.train.schedule_steps == settings.train.steps:
            changed.pop("train.schedule_steps", None)
        return changed


def _verb_of(run: RecordedRun) -> str:
    return trained_by(set().union(*run.lines), has_stage=run.setting("stage") is not None)


def _zeros(lines: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Lines without the field have no sample of the source."""
    return [{"step": line["step"], field: line.get(field) or 0} for line in lines]


def _public(value: Any) -> Any:
    """A value without folders and hosts, which are nobody else's business."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def hub_name(folder: Path) -> str | None:
    """The name of a model on the hub, such as Qwen/Qwen3-VL-8B-Instruct, if its folder is one of the hub's cache."""
    names = [match for part in folder.absolute().parts if (match := _CACHED.fullmatch(part))]
    return f"{names[-1][1]}/{names[-1][2]}" if names else None


def license_of(folder: Path) -> str | None:
    """The licence that the model card in a folder names; None if there is none."""
    card = folder / "README.md"
    text = ""
    with suppress(OSError):
        text = card.read_text(encoding="utf-8", errors="replace")
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = _LICENSE.search(front)
    return found[1] if found else None


def versions() -> dict[str, str]:
    """The versions of megavlm and of the packages that matter for the weights."""
    return {"megavlm": __version__} | machine.versions(_PACKAGES)
