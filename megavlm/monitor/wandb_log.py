"""Logs metrics.jsonl and sampled answers to Weights & Biases. Errors of W&B never interrupt training."""

import configparser
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.monitor.rollout_log import LoggedGroup
from megavlm.monitor.rollout_table import rollout_table
from megavlm.sources.blend import media_access

if TYPE_CHECKING:
    import wandb

FOLDER = "wandb"  # within the output folder: W&B's files and the run's id
ID_FILE = "run_id"
PUBLIC_SERVER = "https://api.wandb.ai"


class WandbLog:
    """One run at Weights & Biases. It continues under the same id when training continues.

    An error of W&B (no network, a wrong key, a full disk) is reported once, and training continues. If the run cannot
    start online, it is logged offline; if it cannot start offline or a line cannot be logged, logging ends.

    Args:
        settings: the settings of the run. `log.wandb.mode` is "online"; "offline": files that `wandb sync` can upload
            later; "off": wandb is not even imported; or "auto": what WANDB_MODE says, otherwise online if one is logged
            in to W&B, otherwise off. All files of W&B are written to `wandb/` in the output folder.
        enabled: False on all ranks except rank 0; then all calls do nothing.
        warn: called with a message if an error occurs (`Progress.say`).
    """

    def __init__(
        self,
        settings: Settings,
        enabled: bool = True,
        warn: Callable[[str], None] = print,
    ):
        self._warn, self._access = warn, media_access(settings.data)
        self._run: wandb.Run | None = None
        self._folder = required(settings.output, "output") / FOLDER
        self.mode = _resolve(settings.log.wandb.mode) if enabled else "off"
        if self.mode == "online" and not self._start("online", settings):
            self.mode = "offline"
        if self.mode == "offline" and not self._start("offline", settings):
            self.mode = "off"

    def log(self, line: Mapping[str, Any]) -> None:
        """Logs one line of metrics.jsonl."""
        self._log(lambda: {name: value for name, value in line.items() if value is not None})

    def log_rollouts(self, step: int, groups: Sequence[LoggedGroup]) -> None:
        """Logs sampled answers of a step, as they stand in rollouts.jsonl, as the table "rollouts"."""
        if groups:
            self._log(lambda: {"step": step, "rollouts": rollout_table(groups, self._access)})

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
        """Where the logs of the run are."""
        if self._run is None:
            return "off"
        if self.mode == "offline":
            return f"offline, files in {self._folder}"
        return self._run.url or "online"

    def _start(self, mode: Literal["online", "offline"], settings: Settings) -> bool:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):  # not in the home folder, which may be full or missing
                if kind != "CONFIG" or not _login_settings().is_file():  # W&B must find what `wandb login --host` wrote
                    os.environ.setdefault(f"WANDB_{kind}_DIR", str(self._folder / kind.lower()))
            os.environ.setdefault("WANDB_SILENT", "true")  # wandb.Settings(silent=True) does not silence the log-in
            import wandb

            wandb.teardown()  # discards the state of a failed attempt to start online
            if mode == "online" and not is_logged_in():  # W&B would ask for a key on the terminal, and wait
                raise RuntimeError("not logged in: run `wandb login`, or set WANDB_API_KEY")
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

    def _log(self, values: Callable[[], dict[str, Any]]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(values())
        except Exception as error:
            self._give_up("cannot log", error)

    def _run_id(self) -> str:
        """The id of an earlier part of this run, or a new id."""
        file = self._folder / ID_FILE
        if not file.exists():
            file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def _give_up(self, what: str, error: Exception) -> None:
        self._warn(f"warning: wandb {what} ({_first_line(error)}); continuing without wandb")
        self._run, self.mode = None, "off"


def is_logged_in() -> bool:
    """Whether there are credentials for W&B: in the environment, or in the netrc file, where `wandb login` puts a key.

    Reads only the environment and two small files; W&B itself is not imported, and nothing is sent.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    try:
        file = next(path for path in map(Path.expanduser, files) if path.is_file())
        hosts = netrc.netrc(file).hosts  # its `default` entry is for other programs
    except (StopIteration, netrc.NetrcParseError, OSError, ValueError, RuntimeError):
        return False
    return bool(hosts.get(urlsplit(_server()).netloc, ("", "", ""))[2])


def _server() -> str:
    """The address of W&B: the public one, unless the environment or `wandb login --host` named another."""
    file = configparser.ConfigParser(interpolation=None)
    try:
        file.read(_login_settings(), encoding="utf-8")
    except (configparser.Error, OSError, ValueError):
        file.clear()
    return os.environ.get("WANDB_BASE_URL") or file.get("default", "base_url", fallback="") or PUBLIC_SERVER


def _login_settings() -> Path:
    """The file of settings that `wandb login --host` writes."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    return Path(folder) / "settings"


def _resolve(mode: str) -> str:
    if mode != "auto":
        return mode
    wanted = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
    return wanted.get(os.environ.get("WANDB_MODE", ""), "online" if is_logged_in() else "off")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
