"""Output folders are never overwritten by accident, and files appear complete."""

import json
import re

import pytest

from megavlm.base import atomic_files
from megavlm.base.errors import UserError
from megavlm.config.load import load_settings
from megavlm.config.renamed import RENAMED
from megavlm.config.settings import Settings
from megavlm.output.folder import (
    StartOptions,
    check_new,
    check_output,
    newest_step,
    plan_start,
    prepare_output,
    record_changes,
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path):
    def settings(**values):
        return Settings(**{"model": {"hf": "hf"}, "output": tmp_path / "run", **values})

    return settings


@pytest.fixture
def run(settings):
    """run(…): the output folder of a run with these settings and a checkpoint of step 20."""

    def run(**values):
        started = settings(**values)
        prepare_output(started)
        atomic_files.write_text(started.output / "checkpoints" / "step_00000020" / "x", "weights")
        return started.output

    return run


def test_a_new_folder_gets_the_resolved_settings(settings):
    assert prepare_output(settings()).action == "new"
    assert load_settings(settings().output / "config.yaml") == settings()


def test_the_same_run_is_continued(settings, run):
    run()
    assert check_output(settings()) == "resume"
    longer = settings(train={"steps": 50, "recompute": "full"}, parallel={"tensor": 2}, log={"every": 5})
    start = prepare_output(longer)
    assert start.action == "resume"
    record_changes(start, 20)
    found = load_settings(longer.output / "config.yaml")
    assert found.train.schedule_steps == 50
    assert found.model_copy(update={"train": longer.train}) == longer


def test_random_weights_are_the_same_start_however_they_are_said(settings, run):
    run()
    assert plan_start(settings(model={"hf": "hf", "load": "random"})).action == "resume"
    with pytest.raises(UserError, match=r"model.load: null there, other now"):
        plan_start(settings(model={"hf": "hf", "load": "other"}))


def test_a_run_of_an_earlier_version_is_refused_with_the_new_names_and_continues_with_them(settings, run):
    """As its config.yaml was written before the settings were renamed: with every setting and its value."""
    file = run() / "config.yaml"
    written = file.read_text()
    earlier = written
    for old, new in RENAMED.items():
        (section, name), called = old.split("."), new.split(".")[1]
        changed = re.sub(rf"(?m)(^{section}:\n(?:  .*\n)*?  ){called}:", rf"\1{name}:", earlier)
        assert changed != earlier, new
        earlier = changed
    file.write_text(earlier)
    with pytest.raises(UserError, match="holds a run whose settings cannot be read") as refused:
        plan_start(settings())
    for old, new in RENAMED.items():
        assert re.search(rf"the setting {old} is now called {new} \(\S+config.yaml:\d+\)", refused.value.message)
    assert refused.value.remedy.startswith(f"correct {file}, or ")
    file.write_text(written)
    assert plan_start(settings()).action == "resume"


def test_what_changed_is_recorded_with_the_step_of_the_change(settings, run):
    folder = run(train={"lr": 1e-5})
    start = prepare_output(settings(train={"lr": 2e-5}, log={"every": 5}), StartOptions(change=("train.lr",)))
    assert not (folder / "changes.jsonl").exists()  # the run is not restored yet
    assert load_settings(folder / "config.yaml").train.lr == 1e-5
    record_changes(start, 20)
    lines = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    assert [{**line, "time": None} for line in lines] == [
        {"step": 20, "time": None, "setting": "train.lr", "old": 1e-5, "new": 2e-5},
        {"step": 20, "time": None, "setting": "log.every", "old": 1, "new": 5},
    ]
    assert check_output(settings(train={"lr": 2e-5})) == "resume"
    with pytest.raises(UserError, match=r"train.lr: 2e-05 there, 1e-05 now"):
        check_output(settings(train={"lr": 1e-5}))


def test_a_longer_run_keeps_the_length_of_its_schedule_unless_asked(settings, run):
    lengths = lambda new, *change: plan_start(settings(train=new), StartOptions(change=change)).settings.train
    run(train={"steps": 30})
    assert lengths({"steps": 60}).schedule_steps == 30
    assert lengths({"steps": 60, "schedule_steps": 60}, "train.schedule_steps").schedule_steps == 60
    assert lengths({"steps": 60, "schedule": "constant"}, "train.schedule").schedule_steps is None
    with pytest.raises(UserError, match=r"train.schedule_steps: 30 there, 60 now") as caught:
        lengths({"steps": 60, "schedule_steps": 60})
    assert "--change train.schedule_steps" in caught.value.remedy


def test_a_run_of_an_older_version_had_the_schedule_of_its_steps(settings, run):
    folder = run(train={"steps": 30})
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"schedule_steps: 30", "schedule_steps: null", text))
    assert plan_start(settings(train={"steps": 60})).settings.train.schedule_steps == 30


def test_the_blend_may_change_and_the_sources_may_not(settings, run):
    blend = lambda a, b, path="b.jsonl": {"train": [{"path": "a.jsonl", "weight": a}, {"path": path, "weight": b}]}
    run(data=blend(1.0, 2.0))
    with pytest.raises(UserError, match=r"data.train\[1\].weight: 2.0 there, 3.0 now") as caught:
        check_output(settings(data=blend(1.0, 3.0)))
    assert "--change data.train" in caught.value.remedy
    allowed = StartOptions(change=("data.train",))
    assert check_output(settings(data=blend(1.0, 3.0)), allowed) == "resume"
    with pytest.raises(UserError, match=r"data.train\[1\].path: b.jsonl there, c.jsonl now") as caught:
        check_output(settings(data=blend(1.0, 3.0, "c.jsonl")), allowed)
    assert "--change" not in caught.value.remedy
    more = {"train": [*blend(1.0, 2.0)["train"], {"path": "c.jsonl"}]}
    with pytest.raises(UserError, match=r"data.train\[2\].path: null there, c.jsonl now") as caught:
        check_output(settings(data=more))
    assert "--change data.train" in caught.value.remedy
    assert check_output(settings(data=more), allowed) == "resume"
    with pytest.raises(UserError, match=r"data.train\[1\].path: b.jsonl there, c.jsonl now"):
        check_output(settings(data={"train": [more["train"][0], more["train"][2], more["train"][1]]}), allowed)
    with pytest.raises(UserError, match=r"--change data.seq_length: a run cannot be continued"):
        check_output(settings(), StartOptions(change=("data.seq_length",)))


def test_a_run_without_a_checkpoint_takes_other_settings(settings):
    prepare_output(settings(train={"lr": 1e-5}))
    changed = settings(train={"lr": 2e-5}, data={"seq_length": 64})
    (changed.output / "checkpoints" / "step_00000002.0badcafe.partial").mkdir(parents=True)
    assert prepare_output(changed).action == "again"
    assert load_settings(changed.output / "config.yaml").data.seq_length == 64


def test_other_settings_are_refused_by_name(settings, run):
    run(train={"lr": 1e-5})
    with pytest.raises(UserError) as caught:
        check_output(settings(train={"lr": 2e-5}, data={"seq_length": 64}, log={"every": 9}))
    assert "holds a run at step 20 with other settings:" in caught.value.message
    assert "train.lr: 1e-05 there, 2e-05 now" in caught.value.message
    assert "data.seq_length: 8192 there, 64 now" in caught.value.message
    assert "log.every" not in caught.value.message
    assert f"model.load={settings().output} output=NEW" in caught.value.remedy
    assert caught.value.message.count("\n") == 2  # no line for a setting that does not differ
    with pytest.raises(UserError) as caught:
        check_output(settings(train={"lr": 2e-5}))
    assert "to continue it with the new values: --change train.lr; or" in caught.value.remedy


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
    (settings().output / "checkpoints" / "step_00000020").mkdir(parents=True)
    with pytest.raises(UserError, match="settings cannot be read"):
        check_output(settings())


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"train": {"lr": 2e-5}, "overwrite": True}, StartOptions()),
        ({"train": {"lr": 1e-5}}, StartOptions(restart=True)),
    ],
)
def test_replacing_removes_what_a_run_writes_and_nothing_else(settings, run, values, options):
    folder = run(train={"lr": 1e-5})
    atomic_files.write_text(folder / "notes.txt", "mine")
    assert prepare_output(settings(**values), options).action == "replace"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "notes.txt"]
    assert load_settings(folder / "config.yaml").train.lr == values["train"]["lr"]


def test_equal_settings_continue_in_spite_of_overwrite(settings, run):
    """As torchrun starts the command again, or a user by hand."""
    folder = run(overwrite=True, train={"steps": 5})
    assert prepare_output(settings(overwrite=True, train={"steps": 9})).action == "resume"
    assert newest_step(folder) == 20
    assert check_output(settings(overwrite=True, train={"lr": 1.0})) == "replace"
    (folder / "config.yaml").write_text("train: {gone: 1}\n")
    with pytest.raises(UserError, match="settings cannot be read"):
        check_output(settings(overwrite=True))


@pytest.mark.parametrize("launcher", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restarted_job_continues_in_spite_of_restart(settings, run, monkeypatch, launcher):
    run()
    assert check_output(settings(), StartOptions(restart=True)) == "replace"
    monkeypatch.setenv(launcher, "1")
    assert check_output(settings(), StartOptions(restart=True)) == "resume"


def test_no_remedy_deletes_a_run(settings, run):
    folder = run(train={"lr": 1e-5})
    remedies = []
    for config in (None, "train: {gone: 1}\n"):
        if config:
            (folder / "config.yaml").write_text(config)
        with pytest.raises(UserError) as caught:
            check_output(settings(train={"lr": 2e-5}, data={"seq_length": 64}))
        remedies.append(caught.value.remedy)
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError) as caught:
        check_output(settings())
    assert not any("overwrite" in remedy or "restart" in remedy for remedy in [*remedies, caught.value.remedy])


def test_result_files_are_not_written_over(settings, tmp_path):
    target = tmp_path / "scores.jsonl"
    check_new(target, settings())
    target.write_text("{}")
    with pytest.raises(UserError, match=r"scores.jsonl exists already"):
        check_new(target, settings())
    check_new(target, settings(overwrite=True))
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "empty", settings())


def test_neither_restart_nor_a_new_run_touches_a_folder_without_a_run(settings):
    folder = settings().output
    atomic_files.write_text(folder / "checkpoints" / "mine", "of another trainer")
    with pytest.raises(UserError, match="holds no run that could be continued"):
        prepare_output(settings(), StartOptions(restart=True))
    atomic_files.write_text(folder / "config.yaml", "of the answers")
    (folder / "checkpoints").rename(folder / "kept")
    atomic_files.write_text(folder / "answers.jsonl", "{}")
    with pytest.raises(UserError, match="holds no run that could be continued"):  # but answers of some model
        prepare_output(settings())
    assert (folder / "kept" / "mine").exists()
    assert (folder / "config.yaml").read_text() == "of the answers"


@pytest.mark.parametrize(("values", "options"), [({"overwrite": True}, {}), ({}, {"restart": True})])
@pytest.mark.parametrize("inside", ["", "checkpoints/step_00000020"])
def test_a_run_does_not_delete_what_it_starts_from(settings, run, values, options, inside):
    folder = run()
    with pytest.raises(UserError, match=r"model\.load is .* whose run would be deleted"):
        prepare_output(settings(model={"hf": "hf", "load": folder / inside}, **values), StartOptions(**options))
    assert (folder / "checkpoints" / "step_00000020" / "x").exists()
    beside = settings(model={"hf": "hf", "load": folder / "start"}, **values)  # which replacing leaves alone
    assert check_output(beside, StartOptions(**options)) == "replace"


def test_overwrite_keeps_what_the_same_run_has_prepared_before_its_first_checkpoint(settings, monkeypatch):
    folder = settings().output
    prepare_output(settings())
    atomic_files.write_text(folder / "reference.safetensors.partial", "of hours")
    assert prepare_output(settings(overwrite=True)).action == "again"
    assert (folder / "reference.safetensors.partial").exists()
    other = settings(overwrite=True, train={"lr": 0.5})
    with monkeypatch.context() as restarted:
        restarted.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert check_output(other) == "again"
    assert check_output(other) == "replace"


def test_a_warm_up_that_is_longer_than_the_schedule_of_the_run_is_refused(settings, run):
    run(train={"steps": 50, "warmup_steps": 10})
    longer = settings(train={"steps": 200, "warmup_steps": 60})
    with pytest.raises(UserError, match="warmup_steps is 60, but this run has a schedule of 50 steps"):
        check_output(longer, StartOptions(change=("train.warmup_steps",)))
