"""Reports while a run goes on: they are there after the run has been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from megavlm.config.settings import Settings
from megavlm.monitor.metrics import REQUIRED
from megavlm.report import at_checkpoint
from megavlm.report.at_checkpoint import ReportAtCheckpoint


def write_metrics(folder, steps) -> None:
    lines = [dict.fromkeys(REQUIRED, 1.0) | {"step": step, "loss": 2.0 / step} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_killed_run_leaves_its_report(tmp_path):
    write_metrics(tmp_path, 4)
    trainer = os.fork()
    if not trainer:  # the run: it has written its first checkpoint, trains on, and is killed
        at_checkpoint.PAUSE = 600.0  # between two reports, not before the first
        ReportAtCheckpoint(tmp_path).due()
        time.sleep(600)
        os._exit(1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "report.html").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert "loss at step 4" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html", "loss.png"}


def test_the_checkpoint_with_which_a_run_ends_starts_no_process(tmp_path, monkeypatch):
    """That is every checkpoint of a run of seconds: its end would have to wait for the process."""
    monkeypatch.setattr(at_checkpoint.subprocess, "Popen", lambda *arguments, **options: started.append(arguments))
    started: list = []
    report = ReportAtCheckpoint(tmp_path)
    report.due()
    time.sleep(0.3)  # in which a report without patience would have begun
    report.close()
    assert not started
    assert not report._thread.is_alive()


def test_a_report_is_due_after_checkpoints_and_logged_answers(tmp_path, monkeypatch):
    """Those of the first rank, which alone has the answers."""
    from megavlm.commands import train

    reports: list = []
    monkeypatch.setattr(train, "ReportAtCheckpoint", lambda output: SimpleNamespace(due=lambda: reports.append(output)))
    monkeypatch.setattr(train, "make_method", lambda *arguments: None)
    monkeypatch.setattr(train, "train", lambda settings, made, hooks, options: hooks)
    settings = Settings(model={"hf": "hf"}, output=str(tmp_path))
    hooks = train.main(settings, "grpo")
    run = SimpleNamespace(session=SimpleNamespace(is_first=True, settings=settings))
    (at_answers,), (at_checkpoint,) = (
        [hook for hook in hooks if getattr(hook, name)] for name in ("at_answers", "at_checkpoint")
    )
    at_answers.call(run, 1, print)
    at_checkpoint.call(run, 2, print)
    assert reports == [tmp_path, tmp_path]


def test_the_first_report_comes_at_once_and_the_next_after_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(at_checkpoint, "PAUSE", 0.5)
    monkeypatch.setattr(at_checkpoint, "_GRACE", 0.05)
    written: list[float] = []
    monkeypatch.setattr(ReportAtCheckpoint, "_write", lambda report: written.append(time.monotonic()))
    report, began = ReportAtCheckpoint(tmp_path), time.monotonic()
    while len(written) < 2 and time.monotonic() < began + 60:
        report.due()
        time.sleep(0.01)
    report.close()
    assert written[0] >= began + 0.05
    assert written[1] >= written[0] + 0.5


def test_torch_is_not_imported():
    code = "import sys, megavlm.report.at_checkpoint as a; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
