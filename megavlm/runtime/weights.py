"""Which weights a verb reads, told to the user and recorded beside the results."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megavlm.base import yaml_files
from megavlm.base.errors import RunFailure, UserError
from megavlm.base.number_format import number
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.folders import best_of, find_checkpoint
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.monitor.metrics import read_metrics
from megavlm.output.held_run import of_run
from megavlm.platform.collectives import all_gather_objects
from megavlm.runtime.held_out_values import comparable_after
from megavlm.runtime.session import Session


@dataclass(frozen=True)
class Weights:
    """Weights that were chosen once, so that a run that goes on meanwhile does not change them.

    Attributes:
        load: the whole weights, ``model.load``; a run's folder has become its newest checkpoint.
        adapter: the adapter on them, if any; likewise.
        run: the output folder of the run that trained them; None for weights that are no checkpoint of a run.
        step: the step after which they were saved.
        ema: whether the moving averages of what was trained are read (``train.ema``).
    """

    load: Path
    adapter: Path | None
    run: Path | None
    step: int | None
    ema: bool = False

    @property
    def trained(self) -> Path:
        """What was trained last: the adapter if there is one."""
        return self.adapter or self.load

    def __str__(self) -> str:
        name = f"{self.trained} (no checkpoint of a run)"
        if self.run is not None:
            name = f"step {self.step} of {self.run} ({self.trained})"
        name += ", moving average" if self.ema else ""
        return f"{name}, an adapter on {self.load}" if self.adapter else name

    def told(self) -> str:
        """The weights and, if they are linked as the best of their run, by which value."""
        if self.run is None or best_of(self.trained.parent) != self.trained:
            return str(self)
        with suppress(UserError):  # the run's other files matter no further here
            tree = yaml_files.read_file(self.run / "config.yaml").tree
            metric = str((tree.get("eval") or {}).get("best"))
            line = next((line for line in read_metrics(self.run) if line["step"] == self.step), {})
            if (value := line.get(metric)) is not None:
                is_old = (self.step or 0) <= comparable_after(self.run, metric)
                on = " on the held-out data before they were changed" if is_old else ""
                return f"{self}, its best by {metric}{on}: {number(value)}"
        return f"{self}, its best"

    def note(self) -> dict[str, Any]:
        """What is recorded beside results."""
        named = {"run": self.run, "load": self.load, "adapter": self.adapter}
        ema = {"ema": True} if self.ema else {}
        return {name: path and str(path) for name, path in named.items()} | {"step": self.step, **ema}

    def digest(self) -> str:
        """Hexadecimal digits that differ if the files of the weights differ."""
        return digest_of_folders(*(Path(path) for path in (self.load, self.adapter) if path is not None))


def choose(settings: Settings, *, ema: bool = False) -> tuple[Settings, Weights]:
    """Chooses the checkpoints that a verb reads: those of the run in ``output``, or those that the settings name.

    With ``ema``, the moving averages in them are meant.

    Returns:
        The settings in which ``model.load`` and ``model.adapter`` are single checkpoints, and a description of them.

    Raises:
        UserError: see ``of_run``; a run has no complete checkpoint.
    """
    settings = of_run(settings)
    load, adapter = required(settings.model.load, "model.load"), settings.model.adapter
    load, adapter = find_checkpoint(load), find_checkpoint(adapter) if adapter is not None else None
    last, run, step = adapter or load, None, None
    kind, _, digits = Path(last).name.partition("_")
    if kind == "step" and digits.isdecimal() and Path(last).parent.name == "checkpoints":
        run, step = Path(last).parent.parent, int(digits)
    model = settings.model.model_copy(update={"load": load, "adapter": adapter})
    return settings.model_copy(update={"model": model}), Weights(load, adapter, run, step, ema)


def tell(weights: Weights, session: Session, stream: TextIO | None = None) -> None:
    """Prints on rank 0 what was loaded. Call it on all ranks.

    Args:
        weights: from ``choose``.
        session: the session that has loaded them.
        stream: where to print; None: standard output.

    Raises:
        RunFailure: the ranks have loaded different checkpoints.
    """
    chosen = sorted(set(all_gather_objects(str(weights), session.groups.world_host)))
    if len(chosen) > 1:
        raise RunFailure(
            f"the processes have loaded different checkpoints, because one was written meanwhile: {', '.join(chosen)}",
            "start the same command again, or name a checkpoint in model.load",
        )
    if session.is_first:
        print(f"weights · {weights.told()}", file=stream, flush=True)
