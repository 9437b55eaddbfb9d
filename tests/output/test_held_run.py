"""Where `output` holds a run, the verbs that read weights use what it has trained, and nobody else's weights."""

import pytest
import yaml

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.output.held_run import of_run
from megavlm.output.inputs import note_inputs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**model): makes a run with this model section and one checkpoint.

    Returns what the section means with the recipe that trained, when some of it is changed.
    """
    monkeypatch.chdir(tmp_path)

    def run(checkpoint=True, type=None, **model):
        config = {"model": {"hf": "hf", **model}, "adapter": {"type": type}, "output": "runs/my"}
        (tmp_path / "runs/my").mkdir(parents=True)
        (tmp_path / "runs/my/config.yaml").write_text(yaml.safe_dump(config))
        if checkpoint:
            (tmp_path / "runs/my/checkpoints/step_00000002").mkdir(parents=True)
        return lambda **changes: of_run(Settings(**{**config, "model": {**config["model"], **changes}})).model

    return run


def test_the_recipe_that_trained_means_the_run(run, tmp_path):
    recipe = run(load="start")
    for given in ("start", str(tmp_path / "start"), "runs/../start", None, "runs/my"):
        assert str(recipe(load=given).load) == "runs/my"


def test_a_named_checkpoint_of_the_run_stays(run):
    assert str(run(load="start")(load="runs/my/checkpoints/step_00000002").load) == "runs/my/checkpoints/step_00000002"


def test_a_run_from_random_weights_needs_no_start(run):
    assert str(run(load=None)().load) == "runs/my"


@pytest.mark.parametrize("change", [{"load": "other"}, {"load": "runs/other"}, {"adapter": "lora"}])
def test_the_weights_of_another_model_are_refused(run, change):
    recipe = run(load="start")
    with pytest.raises(UserError, match="is neither a checkpoint nor the start of") as caught:
        recipe(**change)
    assert "choose another output" in caught.value.remedy


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    recipe = run(load="start", checkpoint=False)
    for begun in (None, "metrics.jsonl"):
        if begun:
            (tmp_path / "runs/my" / begun).write_text("")
        with pytest.raises(UserError, match="holds a run that has no complete checkpoint yet"):
            recipe()
    (tmp_path / "runs/my/checkpoints/step_00000001.abc.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run that has no complete checkpoint yet"):
        recipe()


def test_a_folder_of_answers_is_no_run(run, tmp_path):
    recipe = run(load="start", checkpoint=False)
    (tmp_path / "runs/my/answers.jsonl.partial").write_text("")
    assert str(recipe(load="other").load) == "other"


@pytest.mark.parametrize("first", [{"type": "lora"}, {"adapter": "peft"}])
def test_a_run_of_adapters_gives_its_adapter_on_its_base(run, first):
    recipe = run(load="base", **first)
    named = "runs/my/checkpoints/step_00000002"
    for change, adapter in (({}, "runs/my"), ({"adapter": named}, named), ({"load": named}, named)):
        model = recipe(**change)
        assert (str(model.load), str(model.adapter)) == ("base", adapter)
    for change in ({"load": "other"}, {"adapter": "other"}):
        with pytest.raises(UserError, match="is neither a checkpoint nor the start of"):
            recipe(**change)


def test_a_start_that_was_moved_is_known_by_its_content(run, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "weights").write_text("weights")
    recipe = run(load="start")
    note_inputs(Settings(model={"hf": "hf", "load": "start"}), tmp_path / "runs/my")
    (tmp_path / "start").rename(tmp_path / "moved")
    assert str(recipe(load="moved").load) == "runs/my"
    (tmp_path / "moved" / "weights").write_text("others")
    with pytest.raises(UserError, match="is neither a checkpoint nor the start of"):
        recipe(load="moved")
