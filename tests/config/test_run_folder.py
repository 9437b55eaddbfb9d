"""Output folders are never overwritten by accident, and files appear complete."""

import pytest

from megavlm.base import atomic_files
from megavlm.base.errors import UserError
from megavlm.config.load import load_settings
from megavlm.config.run_folder import check_new, check_output, prepare_output
from megavlm.config.settings import Settings


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.fixture
def settings(tmp_path):
    def settings(**values):
        return Settings(**{"model": {"hf": "hf"}, "output": tmp_path / "run", **values})

    return settings


def test_a_new_folder_gets_the_resolved_settings(settings):
    assert prepare_output(settings()) is False
    assert load_settings(settings().output / "config.yaml") == settings()


def test_the_same_run_is_continued(settings):
    prepare_output(settings())
    assert check_output(settings()) == "resume"
    longer = settings(train={"steps": 50, "recompute": "full"}, parallel={"tensor": 2}, log={"every": 5})
    assert prepare_output(longer) is True
    assert load_settings(longer.output / "config.yaml") == longer


def test_other_settings_are_refused_by_name(settings):
    prepare_output(settings(train={"lr": 1e-5}))
    with pytest.raises(UserError) as caught:
        check_output(settings(train={"lr": 2e-5}, data={"seq_length": 64}, log={"every": 9}))
    assert "holds a run with other settings:" in caught.value.message
    assert "train.lr: 1e-05 there, 2e-05 now" in caught.value.message
    assert "data.seq_length: 8192 there, 64 now" in caught.value.message
    assert "log.every" not in caught.value.message
    assert "overwrite=true" in caught.value.remedy


def test_a_folder_of_something_else_is_refused_and_left_alone(settings):
    atomic_files.write_text(settings().output / "thesis.tex", "years")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        prepare_output(settings())
    assert [path.name for path in settings().output.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_new_and_a_file_is_refused(settings):
    settings().output.mkdir()
    assert check_output(settings()) == "new"
    settings().output.rmdir()
    settings().output.write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(settings())


def test_unreadable_settings_of_an_older_run(settings):
    atomic_files.write_text(settings().output / "config.yaml", "train: {gone: 1}\n")
    with pytest.raises(UserError, match="settings cannot be read"):
        check_output(settings())


def test_overwrite_removes_what_a_run_writes_and_nothing_else(settings):
    prepare_output(settings(train={"lr": 1e-5}))
    run = settings().output
    atomic_files.write_text(run / "checkpoints" / "step_00000001" / "x", "old")
    atomic_files.write_text(run / "notes.txt", "mine")
    assert prepare_output(settings(train={"lr": 2e-5}, overwrite=True)) is False
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "notes.txt"]
    assert load_settings(run / "config.yaml").train.lr == 2e-5


def test_a_requeued_job_continues_in_spite_of_overwrite(settings, monkeypatch):
    prepare_output(settings(overwrite=True))
    assert check_output(settings(overwrite=True)) == "replace"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert check_output(settings(overwrite=True)) == "resume"
    assert check_output(settings(overwrite=True, train={"lr": 1.0})) == "replace"


def test_result_files_are_not_written_over(settings, tmp_path):
    target = tmp_path / "scores.jsonl"
    check_new(target, settings())
    target.write_text("{}")
    with pytest.raises(UserError, match=r"scores.jsonl exists already"):
        check_new(target, settings())
    check_new(target, settings(overwrite=True))
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "empty", settings())
