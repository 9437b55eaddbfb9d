"""Files, bases, overrides, environment variables, and the messages when one of them is wrong."""

import math
from pathlib import Path

import pytest
import yaml

from megavlm.base.errors import UserError
from megavlm.config import describe
from megavlm.config.load import load_settings, resolved_yaml
from megavlm.config.renamed import RENAMED

HF = "model: {hf: folder}\n"


def load(write, text, *overrides):
    return load_settings(write("run.yaml", text), overrides)


# -- what is read --------------------------------------------------------------------------------------------------


def test_defaults_fill_what_a_file_leaves_out(write):
    settings = load(write, HF + "train:\n  steps: 5\n")
    assert settings.model.hf == Path("folder")
    assert settings.train.steps == 5
    assert settings.data.seq_length == 8192
    assert settings.checkpoint.async_save is True


def test_bases_merge_in_order_and_relative_to_the_file_that_names_them(write):
    write("shared/deep/model.yaml", "model: {hf: A, freeze: [vision]}\ntrain: {steps: 1, lr: 0.1}\n")
    write("shared/first.yaml", "base: deep/model.yaml\ntrain: {steps: 2}\n")
    write("shared/second.yaml", "train: {lr: 0.2, seed: 7}\n")
    settings = load(write, "base: [shared/first.yaml, shared/second.yaml]\nmodel: {freeze: [language]}\n")
    assert settings.model.hf == Path("A")
    assert settings.model.freeze == ["language"]  # a list replaces a list
    assert (settings.train.steps, settings.train.lr, settings.train.seed) == (2, 0.2, 7)


def test_one_file_may_be_reached_over_two_bases(write):
    write("root.yaml", HF)
    write("left.yaml", "base: root.yaml\ntrain: {steps: 1}\n")
    write("right.yaml", "base: root.yaml\ntrain: {seed: 2}\n")
    settings = load(write, "base: [left.yaml, right.yaml]\n")
    assert (settings.train.steps, settings.train.seed) == (1, 2)


def test_an_empty_section_keeps_the_base(write):
    write("base.yaml", HF + "train: {steps: 9}\n")
    assert load(write, "base: base.yaml\ntrain:\ndata:\n").train.steps == 9


def test_overrides_win_and_are_yaml(write):
    settings = load(
        write,
        HF + "train: {steps: 1, lr: 1}\n",
        "train.steps=20",
        "train.lr=3e-4",
        "model.freeze=[vision, projector]",
        "data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]",
        "parallel.sequence=false",
        "log.wandb.mode=off",
        "output=runs/a=b",
    )
    assert settings.train.steps == 20
    assert settings.train.lr == 3e-4
    assert settings.model.freeze == ["vision", "projector"]
    assert [(source.path.name, source.weight) for source in settings.data.train] == [("a.jsonl", 2.0), ("b.jsonl", 1.0)]
    assert settings.parallel.sequence is False
    assert settings.log.wandb.mode == "off"  # YAML 1.1 would read false
    assert settings.output == Path("runs/a=b")


def test_data_train_may_be_one_path(write):
    assert load(write, HF, "data.train=a.jsonl").data.train[0].path == Path("a.jsonl")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("2", 2.0), ("9_00.5", 900.5)]
)
def test_spellings_of_numbers(write, text, value):
    assert math.isclose(load(write, HF + f"train: {{lr: {text}}}\n").train.lr, value)


def test_environment_variables(write, monkeypatch):
    monkeypatch.setenv("MEGAVLM_TEST_DATA", "/scratch/me")
    monkeypatch.delenv("MEGAVLM_TEST_UNSET", raising=False)
    settings = load(
        write,
        "model: {hf: '${MEGAVLM_TEST_DATA}/hf', load: '${MEGAVLM_TEST_UNSET:-null}'}\n"
        "train: {steps: '${MEGAVLM_TEST_UNSET:-100}'}\n"
        "data: {eval: '${MEGAVLM_TEST_DATA:-/other}/eval.jsonl'}\n",
    )
    assert settings.model.hf == Path("/scratch/me/hf")
    assert settings.model.load is None
    assert settings.train.steps == 100
    assert [source.path for source in settings.data.eval] == [Path("/scratch/me/eval.jsonl")]


def test_resolved_yaml_gives_the_same_settings_back_with_every_default(write):
    settings = load(write, HF, "train.lr=1e-5", "log.wandb.mode=off", "log.wandb.project='1e5'", "output='017'")
    text = resolved_yaml(settings)
    assert load_settings(write("resolved.yaml", text)) == settings
    plain = yaml.safe_load(text)  # other people's scripts read it with YAML 1.1
    assert plain["log"]["wandb"] == {"mode": "off", "project": "1e5"}
    assert plain["output"] == "017"
    assert plain["train"]["lr"] == 1e-5
    assert plain["checkpoint"]["async"] is True
    assert plain["data"]["seq_length"] == 8192


# -- what is an error ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train.warmup_step", "did you mean train.warmup_steps?"),
        ("train.sequence_length", "did you mean data.seq_length?"),
        ("train.learning_rate", "did you mean train.lr (maximum learning rate)?"),
        ("modle", "did you mean model?"),
        ("log.wandb.projcet", "did you mean log.wandb.project?"),
        ("vision.xyz", "known keys in vision: recompute, chunk_patches, window, offload, balance"),
    ],
)
def test_unknown_key_names_the_nearest(refused, key, remedy):
    error = refused(HF, f"{key}=1")
    assert error.message == f"unknown setting {key} (override {key}=1)"
    assert error.remedy == remedy


def test_unknown_key_names_file_and_line(refused, write):
    write("below.yaml", "train:\n  steps: 3\n  stpes: 4\n")
    assert refused("base: below.yaml\n" + HF).message == "unknown setting train.stpes (below.yaml:3)"


def test_unknown_key_in_a_list_of_sources(refused):
    error = refused(HF + "data:\n  train:\n    - path: a\n      wieght: 2\n")
    assert error.message == "unknown setting data.train[0].wieght (run.yaml:5)"
    assert error.remedy == "did you mean data.train[0].weight?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=ten", "train.steps is 'ten' (override train.steps=ten); allowed: whole number ≥ 1, or null"),
        ("train.steps=0", "train.steps is 0 (override train.steps=0); allowed: whole number ≥ 1, or null"),
        ("train.steps=1e3", "train.steps is 1000 (override train.steps=1e3); allowed: whole number ≥ 1, or null"),
        ("data.workers=true", "data.workers is true (override data.workers=true); allowed: whole number ≥ 0"),
        ("train.lr='1'", "train.lr is '1' (override train.lr='1'); allowed: number > 0 and ≤ 1000, or null"),
        ("train.clip_grad=.inf", "train.clip_grad is inf (override train.clip_grad=.inf); allowed: number ≥ 0"),
        ("train.clip_grad=.nan", "train.clip_grad is nan (override train.clip_grad=.nan); allowed: number ≥ 0"),
        ("overwrite=yes", "overwrite is 'yes' (override overwrite=yes); allowed: true | false"),
        ("stage=4", "stage is 4 (override stage=4); allowed: whole number 0 … 3, or null"),
        (
            "train.schedule=cosin",
            (
                "train.schedule is 'cosin' (override train.schedule=cosin); "
                "allowed: cosine | linear | constant | wsd | inverse_sqrt | table"
            ),
        ),
        (
            "model.freeze=[x]",
            "model.freeze[0] is 'x' (override model.freeze=[x]); allowed: list of vision | projector | language",
        ),
        (
            "vision=7",
            "vision is 7 (override vision=7); allowed: section with recompute, chunk_patches, window, offload, balance",
        ),
        ("output=''", "output is '' (override output=''): the path is empty"),
    ],
)
def test_wrong_type_or_range(refused, override, message):
    assert refused(HF, override).message == message


@pytest.mark.parametrize("override", ["train.steps={}", "{}=1", "train={{lr: [{}]}}", "train.lr={{a: {}}}", "train.{}"])
def test_a_value_is_quoted_on_one_line_however_long_it_is(refused, override):
    assert len(str(refused(HF, override.format("iVBORw0KGgo" * 9999)))) < 800


def test_all_problems_are_told_at_once(refused):
    message = refused("train:\n  steps: no\n  lr: -1\nfoo: 1\n").message
    assert message.startswith("4 problems in the settings:\n- ")
    for part in (
        "model.hf is not set",
        "train.steps is 'no' (run.yaml:2)",
        "train.lr is -1 (run.yaml:3)",
        "setting foo",
    ):
        assert part in message


def test_missing_hf(refused):
    error = refused("train: {steps: 1}\n")
    assert error.message.startswith("model.hf is not set (Hugging Face folder")
    assert error.remedy == "add it to run.yaml, or model.hf=… on the command line"


def test_missing_file(write):
    write("x", "")
    with pytest.raises(UserError, match=r"cannot read configuration file nowhere.yaml: No such file or directory"):
        load_settings("nowhere.yaml")


def test_missing_base_names_who_asked_for_it(refused):
    assert "lost.yaml (base of run.yaml): No such file" in refused("base: lost.yaml\n").message


def test_folder_in_place_of_a_file(write, tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        load_settings(tmp_path)


def test_cycle_of_bases(refused, write):
    write("other.yaml", "base: run.yaml\n")
    assert refused("base: other.yaml\n").message == "base files form a cycle: run.yaml → other.yaml → run.yaml"


def test_base_of_wrong_type(refused):
    assert "base is [1] (run.yaml:1)" in refused("base: [1]\n").message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: [1\n", "run.yaml:3: does not parse as YAML"),
        ("a: b: c\n", "run.yaml:1: does not parse as YAML: mapping values are not allowed here"),
        ("train:\n\tsteps: 1\n", "run.yaml:2: does not parse as YAML"),
        ("train: {steps: 1}\ntrain: {lr: 1}\n", "run.yaml:2: does not parse as YAML: train is written twice"),
        ("- a\n", "run.yaml holds a list, not settings"),
    ],
)
def test_files_that_do_not_parse(refused, text, message):
    assert message in refused(text).message


def test_unset_environment_variable(refused, monkeypatch):
    monkeypatch.delenv("MEGAVLM_TEST_UNSET", raising=False)
    error = refused("model:\n  hf: ${MEGAVLM_TEST_UNSET}/x\n")
    assert error.message == (
        "model.hf uses ${MEGAVLM_TEST_UNSET} (run.yaml:2), but the environment variable MEGAVLM_TEST_UNSET is not set"
    )


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_malformed_overrides(refused, override):
    assert refused(HF, override).message == f"override {override!r} is not of the form section.key=value"


def test_override_value_that_does_not_parse(refused):
    assert "override 'data.train=[{path': the value does not parse as YAML" in refused(HF, "data.train=[{path").message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(refused, old, new):
    error = refused(HF, f"{old}=1")
    assert error.message.startswith(f"the setting {old} is now called {new} (override {old}=1)")
    assert describe.find(tuple(new.split("."))) is not None
