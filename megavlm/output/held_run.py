"""The run in the output folder: verbs that read weights use what it has trained, and no other model's weights."""

import re
from pathlib import Path
from typing import Any

from megavlm.base import yaml_files
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.output.inputs import has_moved

_RESULTS = ("answers*", "scores*")  # a folder with these alone and a config.yaml belongs to infer or score


def holds_run(folder: Path) -> bool:
    """Whether a training run has been started in a folder."""
    if not (folder / "config.yaml").is_file():
        return False
    begun = (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()
    return begun or not any(path for name in _RESULTS for path in folder.glob(name))


def of_run(settings: Settings) -> Settings:
    """The settings with ``model.load`` (or, for a run of adapters, ``model.adapter``) from the run in ``output``.

    Without a run in ``output``, the settings are returned unchanged. Otherwise the recipe that trained it is enough:
    where the weights are those that the run started from, they are replaced by the run, which means its newest
    checkpoint. A checkpoint of the run may be named. It needs no torch, so that mistakes are told at once.

    Raises:
        UserError: ``model.load`` or ``model.adapter`` belongs to another model, or the run has no checkpoint yet.
    """
    run, model = settings.output, settings.model
    if run is None or not holds_run(run):
        return settings
    config = yaml_files.read_file(run / "config.yaml").tree
    start: dict[str, Any] = config.get("model") or {}
    load, adapter = model.load, model.adapter
    if (config.get("adapter") or {}).get("type") is not None or start.get("adapter") is not None:
        if load is not None and _is_inside(load, run):  # its checkpoints hold adapters alone, so this is what is meant
            load, adapter = None, load
        adapter = _trained(adapter, "adapter", start, run)
        load = _start(load, "load", start, run)
    else:
        load = _trained(load, "load", start, run)
        adapter = _start(adapter, "adapter", start, run)
    return settings.model_copy(update={"model": model.model_copy(update={"load": load, "adapter": adapter})})


def _trained(given: Any, key: str, start: dict[str, Any], run: Path) -> Any:
    """The run, or the checkpoint of it that was given."""
    if given is not None and _is_inside(given, run):
        return given
    _start(given, key, start, run)
    if not any(re.fullmatch(r"step_\d+", path.name) for path in (run / "checkpoints").glob("step_*")):
        raise UserError(
            f"output {run} holds a run that has no complete checkpoint yet",
            "continue the run, or choose another output for the model that it starts from",
        )
    return run


def _start(given: Any, key: str, start: dict[str, Any], run: Path) -> Any:
    """What the run started from. Raises UserError if something else was given."""
    began = start.get(key)
    if given is None:
        return None if began is None else Path(began)
    if began is not None and (
        str(given) == str(began) or Path(given).resolve() == Path(began).resolve() or has_moved(began, given, run)
    ):
        return given
    raise UserError(
        f"model.{key} is {given}, but output {run} holds a run, which this is neither a checkpoint nor the start of: "
        "what another model gives does not go into the folder of a run",
        f"leave model.{key} as it was for the run's newest checkpoint, name one in {run / 'checkpoints'}, or choose "
        "another output (output=null if no file is written there)",
    )


def _is_inside(path: Any, run: Path) -> bool:
    """Whether a path is the run's folder or one of its checkpoints."""
    whole, folder = Path(path).resolve(), run.resolve()
    return whole == folder or whole.is_relative_to(folder / "checkpoints")
