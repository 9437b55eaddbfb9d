"""A run whose data or model has been moved continues: content decides, not the path."""

import shutil

import pytest

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.output.folder import check_output, prepare_output, record_changes
from megavlm.output.inputs import note_inputs


@pytest.fixture
def inputs(tmp_path):
    """A folder with data, a Hugging Face folder, and a run to start from, whose report is no part of it."""
    folder = tmp_path / "inputs"
    for name, content in {
        "a.jsonl": "{}",
        "b.jsonl": "[1]",
        "c.jsonl": "[2]",
        "hf/config.json": "{}",
        "hf/model.safetensors": "weights",
        "start/checkpoints/step_00000003/weights": "old",
        "start/checkpoints/step_00000010/weights": "new",
        "start/report.html": "report",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def settings(tmp_path):
    def settings(folder, *, data_first="a.jsonl", **values):
        train = [{"path": folder / data_first}, {"sources": [{"path": folder / "b.jsonl"}], "weight": 2.0}]
        return Settings(
            **{
                "model": {"hf": folder / "hf", "load": folder / "start"},
                "data": {"train": train, "replay": {"sources": [{"path": folder / "c.jsonl"}]}},
                "output": tmp_path / "run",
                **values,
            }
        )

    return settings


@pytest.fixture
def begin(settings, inputs, tmp_path):
    """Starts the run, notes its inputs, and leaves a checkpoint."""
    prepare_output(settings(inputs))
    assert note_inputs(settings(inputs), tmp_path / "run") == []
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)


def test_a_run_continues_with_its_data_and_model_at_another_path(settings, inputs, begin, tmp_path):
    for name in ("moved", "moved again"):
        inputs = inputs.rename(tmp_path / name)
        (inputs / "start" / "report.html").write_text("another report")
        assert check_output(settings(inputs)) == "resume"
        start = prepare_output(settings(inputs))
        assert start.action == "resume"
        assert note_inputs(settings(inputs), tmp_path / "run") == []
        record_changes(start, 1)
        assert not (tmp_path / "run" / "changes.jsonl").exists()
    with pytest.raises(UserError, match=r"train\.lr"):
        check_output(settings(inputs, train={"lr": 0.5}))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("a.jsonl", "data.train[0].path"),
        ("b.jsonl", "data.train[1].sources[0].path"),
        ("c.jsonl", "data.replay.sources[0].path"),
        ("hf/model.safetensors", "model.hf"),
        ("start/checkpoints/step_00000010/weights", "model.load"),
    ],
)
def test_other_content_at_another_path_is_another_run(settings, inputs, begin, tmp_path, file, key):
    copy = shutil.copytree(inputs, tmp_path / "copy")
    (copy / file).write_text("other")
    with pytest.raises(UserError, match="holds a run at step 1 with other settings") as caught:
        check_output(settings(copy))
    changed = [line.strip().partition(":")[0] for line in caught.value.message.splitlines()[1:]]
    assert changed == [key]


def test_other_content_at_the_same_path_is_told_once(settings, inputs, begin, tmp_path):
    (inputs / "b.jsonl").write_text("[3, 4]")
    assert check_output(settings(inputs)) == "resume"
    (told,) = note_inputs(settings(inputs), tmp_path / "run")
    assert told.startswith(f"data.train[1].sources[0].path: {inputs / 'b.jsonl'} has other content")
    assert note_inputs(settings(inputs), tmp_path / "run") == []


def test_a_run_of_an_earlier_version_without_notes_is_compared_by_its_paths(settings, inputs, begin, tmp_path):
    (tmp_path / "run" / "inputs.json").unlink()
    assert check_output(settings(inputs)) == "resume"
    with pytest.raises(UserError, match=r"model\.hf"):
        check_output(settings(inputs.rename(tmp_path / "moved")))
