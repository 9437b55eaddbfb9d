"""TensorBoard's files, read back as TensorBoard reads them: every value once, also after a run has continued."""

import json

import pytest

from megavlm.base.errors import UserError
from megavlm.commands import needed
from megavlm.config.settings import Settings
from megavlm.monitor.tensorboard_log import TensorboardLog


def settings(output, on=True):
    return Settings(model={"hf": "model"}, output=output, log={"tensorboard": on})


def points(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_a_run_that_continues_has_no_point_twice(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("time.time", iter(range(10**9, 2 * 10**9)).__next__)  # the files are sorted by their seconds
    said: list[str] = []
    for first, last in ((0, 5), (3, 6), (6, 7)):
        log = TensorboardLog(settings(tmp_path), first, True, said.append)
        if not first:
            log.log({"step": 0, "eval/loss": 9.0})
        for step in range(first + 1, last + 1):
            log.log({"step": step, "loss": first + step / 8, "mfu": None, "lr/vision": 0.5})
        log.close()
        log.close()
    found = points(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 3.5), (5, 3.625), (6, 3.75), (7, 6.875)]
    assert [step for step, _ in found["lr/vision"]] == list(range(1, 8))
    assert found["eval/loss"] == [(0, 9.0)]
    assert "mfu" not in found
    assert not said


def test_only_the_first_rank_writes_and_only_if_it_is_asked_for(tmp_path):
    for on, enabled in ((True, False), (False, True)):
        log = TensorboardLog(settings(tmp_path, on), 0, enabled, pytest.fail)
        log.log({"step": 1, "loss": 1.0})
        log.close()
    assert not list(tmp_path.iterdir())


def test_an_error_is_told_once_and_ends_the_logging(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said: list[str] = []
    log = TensorboardLog(settings(tmp_path), 0, True, said.append)
    log.log({"step": 1, "loss": 1.0})
    log.close()
    assert len(said) == 1
    assert said[0].startswith("warning: TensorBoard's files cannot be written")


def test_a_missing_package_is_told_before_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(needed.importlib.util, "find_spec", lambda name: None)
    needed.check_packages(settings(tmp_path, on=False))
    with pytest.raises(UserError, match=r"the package tensorboard is not installed"):
        needed.check_packages(settings(tmp_path))
    from megavlm.cli.main import main

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("")
    config = {
        "model": {"hf": str(tmp_path / "hf"), "load": "random"},
        "data": {"train": str(tmp_path / "data.jsonl")},
        "train": {"steps": 1, "lr": 1e-3, "global_batch_size": 1},
        "log": {"tensorboard": True},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(["sft", str(tmp_path / "run.yaml")]) == 2
    assert "the package tensorboard is not installed" in capsys.readouterr().err
