"""Weights & Biases: off unless one is logged in or asks for it; quiet, inside the output folder, never in the way."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from megavlm.config.settings import Settings
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup
from megavlm.monitor.wandb_log import WandbLog, is_logged_in

LINE = {"step": 1, "loss": 0.5, "mfu": None}


def settings(mode, output):
    return Settings(model={"hf": "model"}, output=output, log={"wandb": {"mode": mode}}, train={"lr": 1e-4})


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No key, a home folder of its own, and an environment that is as before afterwards."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_SILENT", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, "")  # remembered, so that it is restored
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class FakeWandb(SimpleNamespace):
    """Stands in for the package: starts in the modes it is told to, and records."""

    def __init__(self, works=("online", "offline"), log_error=None):
        super().__init__(works=works, started=[], logged=[], finished=[])
        self.log_error = log_error
        self.Settings = SimpleNamespace

    def teardown(self):
        pass

    def init(self, mode, **options):
        if mode not in self.works:
            raise RuntimeError("no route to host\nand more")
        self.started.append((mode, options["id"]))
        return SimpleNamespace(
            url="https://wandb.example/run", define_metric=lambda *a, **k: None, log=self._log, finish=self._finish
        )

    def _log(self, line):
        if self.log_error:
            raise self.log_error
        self.logged.append(line)

    def _finish(self, exit_code):
        self.finished.append(exit_code)


def fake(monkeypatch, **options):
    module = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_offline_for_real(tmp_path, capfd, media):
    """The package itself: files that have the numbers and sampled answers with their pictures; one id over a resume;
    silence; nothing in the home folder.
    """
    output = tmp_path / "run"
    answers = [
        LoggedAnswer("<b>\U0001f408</b>", 0.5, {"exact": 1, "math": None}, None, 3, "length", ["math: died", "more"]),
        LoggedAnswer("", None, {"format": 0.25}, -1.5, 0, "stop"),
    ]
    groups = [
        LoggedGroup(f"{media.base}/a.jsonl:3", "Which?", ["large.jpg", "gone.jpg", "large.jpg"], "a cat", answers),
        LoggedGroup(f"{media.base}/a.jsonl:4", "", ["gone.jpg"], None, answers[1:]),
    ]
    for _ in range(2):
        run = WandbLog(settings("offline", output))
        assert run.mode == "offline"
        assert str(output) in run.description
        run.log_rollouts(7, groups)
        run.log({"step": 7, "loss": 0.123456789})
        run.finish()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    files = list(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{(output / 'wandb/run_id').read_text().strip()}"}
    assert all(b"0.123456789" in file.read_bytes() for file in files)
    assert not list((tmp_path / "home").iterdir())
    (file, _) = output.glob("wandb/offline-run-*/files/media/table/rollouts_*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [column for column in table["columns"] if "picture" in column] == ["picture", "picture 2", "picture 3"]
    assert [row.pop("picture") for row in rows] == ["Image", "Image", None]
    assert [row.pop("picture 2") for row in rows] == [None, None, None]  # a file that is not there
    assert [row.pop("picture 3") for row in rows] == ["Image", "Image", None]
    staged = [path.read_bytes() for path in output.glob("wandb/data/artifacts/staging/*")]
    pictures = [content for content in staged if content.startswith(b"\x89PNG")]
    assert len(pictures) == 4  # two for each start
    with Image.open(io.BytesIO(pictures[0])) as stored:
        assert stored.size == (320, 320)
    assert rows[0] == {
        "sample": groups[0].sample, "question": "Which?", "reference": "a cat", "answer": "<b>\U0001f408</b>",
        "reward": 0.5, "reward/exact": 1.0, "reward/math": None, "reward/format": None, "advantage": None, "tokens": 3,
        "finish": "length", "failures": "math: died; more",
    }  # fmt: skip
    assert [row["advantage"] for row in rows] == [None, -1.5, -1.5]


def test_off_imports_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail, and warn
    warnings = []
    run = WandbLog(settings("off", tmp_path), warn=warnings.append)
    run.log(LINE)
    run.finish()
    assert (run.description, warnings, list(tmp_path.glob("wandb*"))) == ("off", [], [])


def test_other_ranks_do_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings = []
    run = WandbLog(settings("offline", tmp_path), enabled=False, warn=warnings.append)
    run.log(LINE)
    run.log_rollouts(1, [LoggedGroup("a:1", "", [], None, [])])
    assert warnings == []


def test_a_run_that_asks_for_nothing_makes_no_folder_and_no_connection(monkeypatch, tmp_path):
    """The default, for somebody who never logged in to W&B: the package is not even imported."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "home/.netrc").write_text("default login somebody password of-another-program")
    output, warnings = tmp_path / "run", []
    output.mkdir()
    run = WandbLog(Settings(model={"hf": "model"}, output=output, train={"lr": 1e-4}), warn=warnings.append)
    run.log(LINE)
    run.finish()
    assert (run.mode, run.description, warnings, list(output.iterdir())) == ("off", "off", [], [])


def key_in_the_environment(monkeypatch, home):
    monkeypatch.setenv("WANDB_API_KEY", "key")


def token_file_in_the_environment(monkeypatch, home):
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "token")


def logged_in(monkeypatch, home):
    wbnetrc = pytest.importorskip("wandb.sdk.lib.wbauth.wbnetrc")
    wbnetrc.write_netrc_auth(host="https://api.wandb.ai", api_key="k" * 40)  # what `wandb login` calls
    assert (home / ".netrc").is_file()


def logged_in_with_another_netrc(monkeypatch, home):
    monkeypatch.setenv("NETRC", str(home / "mine"))
    (home / "mine").write_text("machine api.wandb.ai login user password key")


def logged_in_at_a_server_of_ones_own(monkeypatch, home):
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text("[default]\nbase_url = https://wandb.example:8080\n")
    (home / ".netrc").write_text("machine wandb.example:8080 login user password key")


@pytest.mark.parametrize(
    "log_in",
    [
        key_in_the_environment,
        token_file_in_the_environment,
        logged_in,
        logged_in_with_another_netrc,
        logged_in_at_a_server_of_ones_own,
    ],
)
def test_a_run_is_online_when_one_is_logged_in(log_in, monkeypatch, tmp_path):
    log_in(monkeypatch, tmp_path / "home")
    wandb = fake(monkeypatch)
    run = WandbLog(settings("auto", tmp_path))
    run.log(LINE)
    run.finish(exit_code=1)
    assert wandb.started[0][0] == "online"
    assert wandb.logged == [{"step": 1, "loss": 0.5}]
    assert wandb.finished == [1]
    assert run.description == "off"
    # where W&B reads the address of one's own server, it must go on reading
    assert ("WANDB_CONFIG_DIR" in os.environ) == (log_in is not logged_in_at_a_server_of_ones_own)


@pytest.mark.parametrize(
    "netrc", ["machine wandb.example login user password key", "machine api.wandb.ai login user", 'machine "', "\0"]
)
def test_a_netrc_without_a_key_for_wandb_is_no_login(netrc, monkeypatch, tmp_path):
    (tmp_path / "home/.netrc").write_text(netrc)
    assert not is_logged_in()


@pytest.mark.parametrize(
    ("variable", "mode"), [("offline", "offline"), ("disabled", "off"), ("online", "online"), ("", "online")]
)
def test_WANDB_MODE_is_what_auto_does(variable, mode, monkeypatch, tmp_path):
    fake(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_MODE", variable)
    assert WandbLog(settings("auto", tmp_path)).mode == mode
    assert WandbLog(settings("off", tmp_path)).mode == "off"


def test_online_without_a_login_does_not_ask_for_a_key(monkeypatch, tmp_path):
    wandb, warnings = fake(monkeypatch), []
    run = WandbLog(settings("online", tmp_path), warn=warnings.append)
    assert run.mode == "offline"
    assert [mode for mode, _ in wandb.started] == ["offline"]
    said = "warning: wandb cannot start online (not logged in: run `wandb login`, or set WANDB_API_KEY)"
    assert warnings == [f"{said}; continuing offline"]


def test_online_falls_back_to_offline_under_the_same_id(monkeypatch, tmp_path):
    wandb = fake(monkeypatch, works=("offline",))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    warnings = []
    run = WandbLog(settings("online", tmp_path), warn=warnings.append)
    assert run.mode == "offline"
    assert wandb.started == [("offline", (tmp_path / "wandb/run_id").read_text().strip())]
    assert warnings == ["warning: wandb cannot start online (no route to host); continuing offline"]


def test_no_start_is_a_warning(monkeypatch, tmp_path):
    fake(monkeypatch, works=())
    warnings = []
    run = WandbLog(settings("offline", tmp_path), warn=warnings.append)
    run.log(LINE)
    run.finish()
    assert run.mode == "off"
    assert len(warnings) == 1


def test_failing_log_is_said_once(monkeypatch, tmp_path):
    fake(monkeypatch, log_error=OSError("disk full"))
    warnings = []
    run = WandbLog(settings("offline", tmp_path), warn=warnings.append)
    run.log(LINE)
    run.log(LINE)
    assert warnings == ["warning: wandb cannot log (disk full); continuing without wandb"]
