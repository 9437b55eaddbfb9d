"""Logs the lines of metrics.jsonl to Weights & Biases. Errors of W&B never interrupt training."""

import os
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from megavlm.config.requirements import required
from megavlm.config.settings import Settings

if TYPE_CHECKING:
    import wandb

FOLDER = "wandb"  # within the output folder: W&B's files and the run's id
ID_FILE = "run_id"


class WandbLog:
    """One run at Weights & Biases. It continues under the same id when training continues.

    An error of W&B (no network, a wrong key, a full disk) is reported once, and training continues. If the run cannot
    start online, it is logged offline; if it cannot start offline or a line cannot be logged, logging ends.

    Args:
        settings: the settings of the run. `log.wandb.mode` is "online"; "offline": files that `wandb sync` can upload
            later; "auto": online if WANDB_API_KEY is set, otherwise offline; or "off": wandb is not even imported. All
            files of W&B are written to `wandb/` in the output folder.
        enabled: False on all ranks except rank 0; then all calls do nothing.
        warn: called with a message if an error occurs (`Progress.say`).
    """

    def __init__(
        self,
        settings: Settings,
        enabled: bool = True,
        warn: Callable[[str], None] = print,
    ):
        self._warn = warn
        self._run: wandb.Run | None = None
        self._folder = required(settings.output, "output") / FOLDER
        self.mode = _resolve(settings.log.wandb.mode) if enabled else "off"
        if self.mode == "online" and not self._start("online", settings):
            self.mode = "offline"
        if self.mode == "offline" and not self._start("offline", settings):
            self.mode = "off"

    def log(self, line: Mapping[str, Any]) -> None:
        """Logs one line of metrics.jsonl."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in line.items() if value is not None})
        except Exception as error:
            self._give_up("cannot log", error)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run; an online run first uploads its last lines. An `exit_code` other than 0 marks it as failed."""
        if self._run is None:
            return
        try:
            import wandb

            self._run.finish(exit_code=exit_code)
            wandb.teardown()  # ends W&B's helper process; until then its file may be incomplete
        except Exception as error:
            self._give_up("cannot end the run", error)
        self._run = None

    @property
    def description(self) -> str:
        """Where the logs of the run are, for the run's header."""
        if self._run is None:
            return "off"
        if self.mode == "offline":
            return f"offline, files in {self._folder}"
        return self._run.url or "online"

    def _start(self, mode: Literal["online", "offline"], settings: Settings) -> bool:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):  # not in the home folder, which may be full or missing
                os.environ.setdefault(f"WANDB_{kind}_DIR", str(self._folder / kind.lower()))
            os.environ.setdefault("WANDB_SILENT", "true")  # wandb.Settings(silent=True) does not silence the log-in
            import wandb

            wandb.teardown()  # discards the state of a failed attempt to start online
            self._run = run = wandb.init(
                project=settings.log.wandb.project,
                name="/".join(self._folder.parent.absolute().parts[-2:]),
                id=self._run_id(),
                resume="allow",
                mode=mode,
                dir=self._folder.parent,
                config=settings.model_dump(mode="json", by_alias=True),
                settings=wandb.Settings(silent=True, console="off", init_timeout=30, disable_code=True),
            )
            # W&B's own step counter cannot go back, but steps are repeated after a resume, so use our step as the axis.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:
            remedy = "continuing offline" if mode == "online" else "continuing without wandb"
            self._warn(f"warning: wandb cannot start {mode} ({_first_line(error)}); {remedy}")
            return False
        return True

    def _run_id(self) -> str:
        """The id of an earlier part of this run, or a new id."""
        file = self._folder / ID_FILE
        if not file.exists():
            file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def _give_up(self, what: str, error: Exception) -> None:
        self._warn(f"warning: wandb {what} ({_first_line(error)}); continuing without wandb")
        self._run, self.mode = None, "off"


def _resolve(mode: str) -> str:
    if mode == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return mode


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
