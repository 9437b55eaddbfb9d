"""Output folders: whether one may be written to, and whether a run continues in it."""

import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavlm.base import atomic_files
from megavlm.base.errors import UserError
from megavlm.config.load import load_settings, resolved_yaml
from megavlm.config.settings import Settings
from megavlm.output import changes, lock
from megavlm.output.held_run import holds_run
from megavlm.output.inputs import FILE, at_noted_paths

CHANGES_FILE = "changes.jsonl"  # the changes of settings with which a run was continued
# The files and folders that a run writes. Overwriting removes only these.
RUN_FILES = (
    "config.yaml",
    "checkpoints",
    "metrics.jsonl",
    "data_errors.jsonl",
    "fatal_samples",
    FILE,
    CHANGES_FILE,
    "reference.safetensors",
    "reference_held_out.safetensors",
    "loss.png",
    "report.html",
    "expert_load.json",
    "plan.json",
    "rollouts.jsonl",
    "held_out_answers.jsonl",
    "tensorboard",
    "wandb",
    "stacks",
    "profile",
    *(
        f"{name}{end}"
        for name in ("answers", "scores")
        for end in (".jsonl", ".json", "_errors.jsonl", ".jsonl.partial")
    ),
    ".alive",
    "reference.safetensors.partial",
    "reference_held_out.safetensors.partial",
)
_CHECKPOINT = re.compile(r"step_(\d+)")  # the name of a complete checkpoint, see checkpoint/folders.py


@dataclass(frozen=True)
class StartOptions:
    """What the command line says about a run that is in the output folder already.

    Attributes:
        restart: delete it and start from the beginning. A job that its launcher has restarted ignores this, so that it
            continues what its own first start has written.
        change: the settings that may differ from those of the run (see ``changes.CHANGEABLE``).
    """

    restart: bool = False
    change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """What a start does with its output folder.

    Attributes:
        action: "new": nothing is there; "resume": continue the run; "again": an earlier start has left no checkpoint,
            so the run begins again, whatever its settings were; "replace": delete the files of an earlier run.
        settings: the settings of the run, with ``train.schedule_steps`` as the run's first start had it.
        before: the settings of the start before; only with "resume".
        changed: all keys whose values differ from then: {key: (old, new)}.
    """

    action: Literal["new", "resume", "again", "replace"]
    settings: Settings
    before: Settings | None = None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def plan_start(settings: Settings, options: StartOptions = StartOptions()) -> Start:
    """What a start with these settings would do with the output folder. Changes nothing.

    A folder with the config.yaml of the same run is continued. No setting deletes a run with the same settings; if the
    settings differ and ``overwrite`` is true, the run is replaced.

    Raises:
        UserError: the folder contains something else, or a run with other settings.
    """
    folder = _output(settings)
    new = _completed(settings, None)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file", "choose a folder")
    changes.check_change(options.change)
    if not folder.exists() or not any(_counts(path) for path in folder.iterdir()):
        return Start("new", new)
    replaced = Start("replace", new)
    if not holds_run(folder):
        if settings.overwrite:
            return _without_its_own_start(replaced)
        raise UserError(
            f"output {folder} is not empty and holds no run that could be continued", "choose another output"
        )
    if options.restart and not _is_restarted_by_launcher():
        return _without_its_own_start(replaced)
    if newest_step(folder) is None:
        if not settings.overwrite or _is_restarted_by_launcher() or _is_same_run(folder, settings):
            return Start("again", new)
        return _without_its_own_start(replaced)
    try:
        before = load_settings(folder / "config.yaml")
    except UserError as error:
        raise UserError(
            f"output {folder} holds a run whose settings cannot be read: {error.message}",
            f"correct {folder / 'config.yaml'}, or {_new_run(folder)}",
        ) from None
    before = _completed(before, None)
    after = _completed(settings, before)
    # Unless it is given, the length of the schedule follows from other settings, and is no change of its own.
    given = settings.train.schedule_steps is not None
    compared = before if given else with_schedule_steps(before, after.train.schedule_steps)
    here = at_noted_paths(compared, after, folder)  # what was moved is no change
    sources = len(compared.data.train)
    if len(here.data.train) < sources:  # then the numbers of those that are left may be others'
        sources = 0
    obstacles = {
        key: values
        for key, values in changed_keys(compared, here).items()
        if not changes.is_allowed(key, options.change, sources)
    }
    if not obstacles:
        _check_schedule(after)
        return Start("resume", after, before, _all_changes(compared, here))
    if settings.overwrite:
        return _without_its_own_start(replaced)
    remedy = _new_run(folder)
    if all(changes.is_changeable(key, sources) for key in obstacles):
        remedy = f"to continue it with the new values: {changes.flags_for(obstacles)}; or {remedy}"
        end, step = after.train.schedule_steps, newest_step(folder) or 0
        if end is not None and step >= end:
            remedy += (
                f". The schedule has ended at step {end}, so the learning rate stays at min_lr: to give it another "
                "length, add train.schedule_steps=N --change train.schedule_steps"
            )
    message = f"output {folder} holds a run at step {newest_step(folder)} with other settings"
    raise UserError(f"{message}:{changes.listed(obstacles)}", remedy)


def check_output(settings: Settings, options: StartOptions = StartOptions()) -> str:
    """Returns the action of ``plan_start``. Raises a UserError also if a process is writing into the folder."""
    action = plan_start(settings, options).action
    check_unlocked(settings)
    return action


def check_unlocked(settings: Settings) -> None:
    """Raises a UserError if a process is writing into the output folder."""
    lock.check_unlocked(_output(settings))


def prepare_output(settings: Settings, options: StartOptions = StartOptions()) -> Start:
    """Prepares the output folder, and writes config.yaml into it unless the run is continued.

    Only one process of a run may call it. If the run is continued, call ``record_changes`` when it has been restored.

    Raises:
        UserError: see ``plan_start``.
    """
    start = plan_start(settings, options)
    if start.action == "replace":
        for name in RUN_FILES:
            path = _output(settings) / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if start.action != "resume":
        write_config(start)
    return start


def record_changes(start: Start, step: int) -> None:
    """Adds the changes of settings to changes.jsonl and writes config.yaml.

    Args:
        start: the result of ``prepare_output``.
        step: the number of steps that the run has done. The changes hold from the next step on.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [
        json.dumps({"step": step, "time": now, "setting": key, "old": old, "new": new}) + "\n"
        for key, (old, new) in start.changed.items()
    ]
    if lines:
        with (_output(start.settings) / CHANGES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(lines)
    write_config(start)


def _is_same_run(folder: Path, settings: Settings) -> bool:
    """Whether a run without a checkpoint has the same settings, so that what it has prepared is of use."""
    try:
        before = load_settings(folder / "config.yaml")
    except UserError:
        return False
    after = _completed(settings, None)
    return not changed_keys(_completed(before, None), at_noted_paths(before, after, folder))


def _without_its_own_start(start: Start) -> Start:
    """The start, which would delete the files of an earlier run. Raises UserError if it needs some of them."""
    settings = start.settings
    folder = _output(settings).resolve()
    needed = {"model.load": settings.model.load, "model.adapter": settings.model.adapter}
    for key, path in {**needed, "align.reference": settings.align.reference}.items():
        place = None if path is None else Path(path).resolve()
        if place == folder or (place and any(place.is_relative_to(folder / name) for name in RUN_FILES)):
            raise UserError(
                f"{key} is {path}, which is in output {folder}, whose run would be deleted", "choose another output"
            )
    return start


def _check_schedule(settings: Settings) -> None:
    """Raises UserError if the schedule that a run has kept is too short for what is now asked for."""
    train = settings.train
    if train.schedule_steps is not None and train.warmup_steps > train.schedule_steps:
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, but this run has a schedule of {train.schedule_steps} steps",
            "lower warmup_steps, or give the schedule another length: train.schedule_steps=N "
            "--change train.schedule_steps",
        )


def newest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint of the run in this output folder, by its name; None if it has none."""
    root = folder / "checkpoints"
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), default=None)


def check_new(path: Path, settings: Settings) -> None:
    """Raises a UserError if a result file or folder exists and overwrite is false. An empty folder does not count.

    ``path`` is in ``settings.output``, or is the value of --out.
    """
    exists = any(path.iterdir()) if path.is_dir() else path.exists()
    if not exists or settings.overwrite:
        return
    output = settings.output
    other = "choose another --out"
    if output is not None and path.parent == output:
        # another output alone would mean the weights that the run started from
        other = f"write elsewhere: output=NEW{f' model.load={output}' if holds_run(output) else ''}"
    raise UserError(f"{path} exists already", f"move it away, set overwrite=true, or {other}")


def changed_keys(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, except those that are free to change: {key: (old, new)}."""
    return {key: values for key, values in _all_changes(old, new).items() if not changes.is_free(key)}


def _all_changes(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    if old.model.start == new.model.start:  # null and "random" are the same start
        old = old.model_copy(update={"model": old.model.model_copy(update={"load": new.model.load})})
    before, after = (changes.flat(each.model_dump(mode="json", by_alias=True)) for each in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    both = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: (was, now) for key, (was, now) in both.items() if was != now}


def _completed(settings: Settings, before: Settings | None) -> Settings:
    """The settings with the length of the schedule: as given, as it was before, or that of the run."""
    if settings.align.loss == "sigmoid":  # what null means for dpo; earlier versions wrote it for all verbs
        settings = settings.model_copy(update={"align": settings.align.model_copy(update={"loss": None})})
    train = settings.train
    if train.schedule_steps is not None or not (train.has_length or train.epochs):
        return settings
    return with_schedule_steps(settings, (before and before.train.schedule_steps) or train.steps)


def with_schedule_steps(settings: Settings, schedule_steps: int | None) -> Settings:
    """The settings with another ``train.schedule_steps``."""
    train = settings.train.model_copy(update={"schedule_steps": schedule_steps})
    return settings.model_copy(update={"train": train})


def write_config(start: Start) -> None:
    """Writes config.yaml. Only one process of a run may call it."""
    atomic_files.write_text(_output(start.settings) / "config.yaml", resolved_yaml(start.settings))


def _counts(path: Path) -> bool:
    """Whether a file of the output folder shows that it is in use; not what a start leaves that has done nothing."""
    return path.name not in (lock.FILE, "stacks", ".alive") and not path.name.startswith(".config.yaml.")


def _is_restarted_by_launcher() -> bool:
    """Whether SLURM has requeued this job, or torchrun has restarted its processes."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _new_run(folder: Path) -> str:
    return f"start a new run from its weights: model.load={folder} output=NEW"


def _output(settings: Settings) -> Path:
    assert settings.output is not None  # the verbs that call this module require it
    return settings.output
