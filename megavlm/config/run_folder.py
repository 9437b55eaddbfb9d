"""Output folders: whether one may be written to, and whether a run continues in it."""

import os
import shutil
from pathlib import Path
from typing import Any

from megavlm.base import atomic_files
from megavlm.base.errors import UserError
from megavlm.config.load import load_settings, resolved_yaml
from megavlm.config.run_inputs import FILE, at_noted_paths
from megavlm.config.settings import Settings

# Settings that may change when a run is continued, because they change neither the data nor what a step computes.
# train.steps is one of them so that a finished run can be extended.
FREE_TO_CHANGE = (
    "parallel",
    "vision",
    "checkpoint",
    "log",
    "generate",
    "output",
    "overwrite",
    "data.eval",
    "data.pad_multiple",  # follows parallel.context; a run that continues with another value says so
    "data.workers",
    "data.max_bad_fraction",
    "data.max_dropped_fraction",
    "data.media_roots",
    "data.media_protocols",
    "model.kernels",
    "train.steps",
    "train.recompute",
    "train.logprob_chunk_tokens",
    "train.max_skipped_steps",
    "train.hang_minutes",
    "train.memory_check",
)
# The files and folders that a run writes. Overwriting removes only these.
RUN_FILES = (
    "config.yaml",
    "checkpoints",
    "metrics.jsonl",
    "data_errors.jsonl",
    "fatal_samples",
    FILE,
    "reference.safetensors",
    "loss.png",
    "report.html",
    "wandb",
    "stacks",
    ".alive",
    "reference.safetensors.partial",
)


def check_output(settings: Settings) -> str:
    """What would happen to the output folder: "new", "resume" or "replace". Changes nothing.

    A folder with the config.yaml of the same run is continued, even if the run was stopped before its first checkpoint.
    `overwrite: true` starts from the beginning instead, except in a job that the cluster has requeued
    (SLURM_RESTART_COUNT), which continues what its own first start has written.

    Raises:
        UserError: the folder contains something else, or a run with other settings.
    """
    folder = _output(settings)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file", "choose a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return "new"
    obstacle = _why_not_resumable(settings)
    if settings.overwrite:
        requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        return "resume" if requeued and not obstacle else "replace"
    if obstacle:
        raise UserError(obstacle, "choose another output, or set overwrite=true to start from the beginning")
    return "resume"


def prepare_output(settings: Settings) -> bool:
    """Creates the output folder and writes config.yaml into it. Only one process of a run may call it.

    Returns:
        Whether the run continues an earlier start.

    Raises:
        UserError: see `check_output`.
    """
    action = check_output(settings)
    if action == "replace":
        for name in RUN_FILES:
            path = _output(settings) / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    atomic_files.write_text(_output(settings) / "config.yaml", resolved_yaml(settings))
    return action == "resume"


def check_new(path: Path, settings: Settings) -> None:
    """Raises a UserError if a result file or folder exists and overwrite is false. An empty folder does not count."""
    exists = any(path.iterdir()) if path.is_dir() else path.exists()
    if exists and not settings.overwrite:
        raise UserError(f"{path} exists already", "move it away, choose another output, or set overwrite=true")


def changed_keys(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, except those in FREE_TO_CHANGE: {key: (old, new)}."""
    before, after = _flat(old.model_dump(mode="json", by_alias=True)), _flat(new.model_dump(mode="json", by_alias=True))
    return {
        key: (value, after[key])
        for key, value in before.items()
        if value != after[key] and not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)
    }


def _output(settings: Settings) -> Path:
    assert settings.output is not None  # the verbs that call this module require it
    return settings.output


def _why_not_resumable(settings: Settings) -> str | None:
    """Why the run of `settings` cannot be continued in its output folder; None if it can."""
    config = _output(settings) / "config.yaml"
    if not config.is_file():
        return f"output {settings.output} is not empty and holds no run that could be continued"
    try:
        before = load_settings(config)
        changes = changed_keys(before, at_noted_paths(before, settings, _output(settings)))
    except UserError as error:
        return f"output {settings.output} holds a run whose settings cannot be read: {error.message}"
    listed = "".join(f"\n  {key}: {old} there, {new} now" for key, (old, new) in changes.items())
    return f"output {settings.output} holds a run with other settings:{listed}" if listed else None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
