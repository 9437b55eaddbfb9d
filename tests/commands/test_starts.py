"""What a run starts from is never a surprise: it must be said, random weights too, and the terminal repeats it."""

import json
import re

import pytest
from parity import Toys, train_reference
from test_train_verbs import megavlm, metrics_of, sft_config

from megavlm.align.registry import METHODS, make_method
from megavlm.base.errors import UserError
from megavlm.cli.main import main
from megavlm.config.settings import Settings
from megavlm.runtime.adapter_start import check_adapter


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("verb", METHODS)
def test_no_training_verb_starts_from_random_weights_unasked(verb, toys, tmp_path, capfd):
    config, others = (
        sft_config(toys, tmp_path),
        {
            "pretrain": ["stage=0"],
            **{verb: ["rollout.prompts=2", "reward=[{name: exact}]"] for verb in ("grpo", "ppo")},
        },
    )
    assert main([verb, str(config), "model.load=null", *others.get(verb, [])]) == 2
    error = capfd.readouterr().err
    assert f"{verb} needs model.load (what to start from: a Hugging Face folder" in error
    assert f"model.load={toys.folder('dense')}" in error
    assert not (tmp_path / "run").exists()


def test_random_weights_are_trained_when_insisted_on_and_the_header_says_so(toys, tmp_path):
    config = sft_config(toys, tmp_path)
    (toys.root / "random").mkdir()  # a folder of that name changes nothing
    done = megavlm("sft", config, "model.load=random")
    assert re.search(r"start +random weights", done.stdout)
    (line,) = metrics_of(tmp_path / "run")
    ((of_folder, _),) = train_reference(toys.folder("dense"), toys.records, toys.root, steps=1).steps
    assert abs(line["loss"] - of_folder) > 0.01
    for load, words in {"random": "random weights", toys.folder("dense"): "Hugging Face folder"}.items():
        assert re.search(f"start +{words}", megavlm("validate", config, f"model.load={load}").stdout)


NEEDS_WEIGHTS = {
    "dpo": {},
    "dpo with a reference in each step": {"align": {"reference_at": "step"}},
    "kto": {},
}


@pytest.mark.parametrize("case", NEEDS_WEIGHTS)
def test_random_weights_are_refused_where_they_would_be_the_reference(case):
    verb = case.split()[0]
    with pytest.raises(UserError, match=r"model\.load is random, but .* compares the model with the weights"):
        make_method(verb, Settings(model={"hf": "x", "load": "random"}, **NEEDS_WEIGHTS[case]))
    make_method("dpo", Settings(model={"hf": "x", "load": "random"}, align={"loss": "simpo"}))


def test_adapters_and_the_divergence_from_the_start_need_weights(toys):
    model = {"hf": toys.folder("dense"), "load": "random"}
    with pytest.raises(ValueError, match=r"kl_to_start is 0\.1, but model\.load is random"):
        Settings(model=model, train={"kl_to_start": 0.1})
    with pytest.raises(UserError, match=r"adapter\.type is lora, but model\.load is random"):
        check_adapter(Settings(model=model, adapter={"type": "lora"}), None)


def test_the_folder_that_was_trained_and_the_next_run_need_no_checkpoint_between(toys, tmp_path):
    """Three commands: sft, and what uses the run."""
    config = sft_config(toys, tmp_path)
    megavlm("sft", config, "parallel.tensor=2", "--nproc", 2)
    ask = ("--prompt", "Two and two?", "generate.max_new_tokens=4")
    tuned = megavlm("infer", config, f"model.load={tmp_path / 'run'}", *ask).stdout
    megavlm("export", config, f"model.load={tmp_path / 'run'}", "--out", tmp_path / "exported")
    exported = f"model.load={tmp_path / 'exported'}"
    # into another folder, because this one holds the run
    assert megavlm("infer", config, exported, *ask, f"output={tmp_path / 'asked'}").stdout == tuned
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "qwen3_vl"
