"""Checks between settings, and that every setting has a description."""

import re
from collections.abc import Iterator
from typing import get_origin

import pytest
from pydantic import BaseModel

from megavlm.config import describe
from megavlm.config.group_section import GroupSettings
from megavlm.config.sections import CheckpointSettings
from megavlm.config.settings import DataSource, RewardSettings, Settings

HF = "model: {hf: folder}\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=1e-5", "train.min_lr=1e-4"], "train.min_lr is 0.0001, which is greater than train.lr = 1e-05"),
        (["train.steps=5", "train.warmup_steps=6"], "train.warmup_steps is 6, which is greater than train.steps = 5"),
        (["train.schedule=constant", "train.min_lr=1e-6"], "but train.schedule is constant: it would be ignored"),
        (["train.optimizer=sgd", "train.adam_beta2=0.9"], "train.adam_beta2 is 0.9, but train.optimizer is sgd"),
        (["train.precision=fp8"], "train.precision is fp8, but model.kernels is auto"),
        (["model.freeze=[vision, projector, language]"], "nothing would be trained"),
        (["model.freeze=[vision, vision]"], "a part is named twice"),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline is 2, but parallel.pipeline is 1"),
        (["data.min_pixels=100", "data.max_pixels=50"], "is 100, which is greater than data.max_pixels = 50"),
        (["data.video_min_pixels=9", "data.video_max_pixels=5"], "which is greater than data.video_max_pixels = 5"),
        (["data.packing=none", "data.packing_buffer=5"], "but data.packing is none: it would be ignored"),
        (["checkpoint.keep_every=5"], "checkpoint.keep_every is 5, but checkpoint.every is null"),
        (["checkpoint.every=2", "checkpoint.keep_every=5"], "checkpoint.keep_every is 5, but checkpoint.every is 2"),
        (["eval.rows=4"], "eval.rows is 4, but eval.every is null: it would be ignored"),
        (["eval.best=eval/loss"], "eval.best is eval/loss, but eval.every is null: it would be ignored"),
        (["eval.every=1", "data.eval=a.jsonl", "eval.stop_after=2"], "eval.stop_after is 2, but eval.best is null"),
        (["eval.answers.samples=2"], "eval.answers is set, but eval.every is null: it would be ignored"),
        (["eval.answers.scorer=precise"], "eval.answers.scorer"),
        (["eval.answers.scorer={model: runs/rm}"], "a reward model cannot be a scorer"),
        (["eval.every=1"], "eval.every is 1, but data.eval is not set: there is nothing to evaluate"),
        (["eval.every=1", "data.eval=a.jsonl", "eval.best=loss"], "'loss' is not a metric of an evaluation"),
        (["eval.every=1", "data.eval=a.jsonl", "eval.best=eval/kl"], "'eval/kl' is not a metric of an evaluation"),
        (["eval.every=1", "data.eval=a.jsonl", "eval.best=eval/a/loss"], "has no source 'a' beside others"),
        (
            ["eval.every=1", "data.eval=[{path: a.jsonl}, {path: b.jsonl}]", "eval.best=eval/c/loss"],
            "data.eval has no source 'c'",
        ),
        (["data.eval=[{path: x/a.jsonl}, {path: y/a.jsonl}]"], "two sources have the name 'a'"),
        (["generate.top_p=0.5"], "generate.top_p is 0.5, but generate.temperature is 0"),
        (["generate.top_k=5"], "generate.top_k is 5, but generate.temperature is 0"),
        (["data.seq_length=30", "parallel.tensor=4"], "data.seq_length is 30, which is not divisible by"),
        (["parallel.first_stage_layers=3"], "parallel.first_stage_layers is 3, but parallel.pipeline is 1"),
        (
            ["data.pad_multiple=6", "parallel.context=2"],
            "data.pad_multiple is 6, but context parallelism cuts each sample",
        ),
        (
            ["train.lr_scale={vision: 0.1}", "model.freeze=[vision]"],
            "but model.freeze has vision: the entry would be ignored",
        ),
        (["train.galore_rank=64"], "train.galore_rank is 64, but train.optimizer is adam: it would be ignored"),
        (["train.optimizer=sgd", "train.galore_scale=1.0"], "train.galore_scale is 1, but train.optimizer is sgd"),
        (["train.optimizer=galore", "train.galore_update_every=0"], "train.galore_update_every is 0"),
        (["train.groups=[{match: '('}]"], "match is not a regular expression: missing )"),
        (["train.groups=[{match: a, freeze: true, lr_scale: 2}]"], "the group is frozen, but has lr_scale"),
        (["train.optimizer=sgd", "train.ema=0.9"], "train.ema is 0.9, but train.optimizer is sgd"),
        (["train.optimizer=muon", "train.ema=0.9"], "train.ema is 0.9, but train.optimizer is muon"),
        (["train.optimizer=galore", "train.ema=0.9"], "train.ema is 0.9, but train.optimizer is galore"),
        (["train.optimizer=muon", "train.offload_optimizer=true"], "train.offload_optimizer is true, but"),
        (["train.optimizer=sgd", "train.adam_moments=bf16"], "train.adam_moments is bf16, but train.optimizer is sgd"),
        (["train.ema=0.9", "train.offload_optimizer=true"], "the average is made of float32 weights on the GPU"),
        (["train.adam_moments=bf16", "train.adam_beta2=0.99"], "bf16, but train.adam_beta2 is 0.99: bfloat16 rounds"),
        (["model.adapter=[a, b]"], "several adapters cannot be used at the same time"),
        (["train.muon_momentum=0.9"], "train.muon_momentum is 0.9, but train.optimizer is adam: it would be ignored"),
        (["adapter.lr_ratio=4"], "adapter.lr_ratio is 4.0, but adapter.type is null: it would be ignored"),
        (["train.unfreeze_after={vision: 5}"], "but model.freeze is []: the entry for vision would be ignored"),
        (
            ["train.unfreeze_after={vision: 5}", "model.freeze=[vision]", "train.steps=5"],
            "the entry for vision would be ignored",
        ),
        (
            ["train.unfreeze_after={vision: 0}", "model.freeze=[vision]"],
            (
                "train.unfreeze_after.vision is 0 (override train.unfreeze_after={vision: 0}); "
                "allowed: {vision | projector | language: whole number ≥ 1}"
            ),
        ),
        (
            ["train.lr_scale={vision: 0.0}"],
            (
                "train.lr_scale.vision is 0 (override train.lr_scale={vision: 0.0}); allowed: "
                "{vision | projector | language: number > 0}"
            ),
        ),
        (
            ["train.lr_scale={tower: 0.1}"],
            (
                "train.lr_scale.tower is 'tower' (override train.lr_scale={tower: 0.1}); allowed: "
                "{vision | projector | language: number > 0}"
            ),
        ),
        (["data.pad_multiple=3"], "data.seq_length is 8192, which is not divisible by data.pad_multiple = 3"),
    ],
)
def test_combinations_refused(refused, overrides, message):
    error = refused(HF, *overrides)
    assert message in error.message
    assert all(override in error.message for override in overrides if override.split("=")[0] in error.message)


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"lr": 1e-5, "min_lr": 1e-5, "steps": 5, "warmup_steps": 5}},
        {"train": {"precision": "fp8"}, "model": {"hf": "x", "kernels": "te"}},
        {"model": {"hf": "x", "freeze": ["vision", "language"]}},
        {
            "model": {"hf": "x", "freeze": ["vision"]},
            "train": {"unfreeze_after": {"vision": 4}, "lr_scale": {"vision": 0.1}},
        },
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        {"checkpoint": {"every": 2, "keep_every": 10}},
        {"generate": {"temperature": 0.7, "top_p": 0.5, "top_k": 5}},
        {"data": {"seq_length": 32}, "parallel": {"tensor": 4, "context": 4}},
    ],
)
def test_combinations_accepted(values):
    Settings(**{"model": {"hf": "x"}, **values})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[{path: a, epochs: 3}]", "'a' is the only source of its blend and has epochs 3, which has no effect"),
        ("[{path: a, weight: 2}]", "has weight 2, which has no effect"),
        ("[{path: a}, {sources: [{path: b, weight: 2}]}]", "'b' is the only source of its blend and has weight 2"),
        ("[{path: a}, {sources: [{path: b, epochs: 2}], weight: 3}]", "'b' is the only source"),
        ("[{sources: [{path: a}, {path: b}], weight: 2}]", "'a blend' is the only source"),
    ],
)
def test_a_share_of_the_only_source_is_refused(refused, train, message):
    for override in (f"data.train={train}", f"data.replay={{sources: {train}}}"):
        error = refused(HF, override)
        assert message in error.message
        assert "train.steps" in error.remedy


def test_epochs_of_an_only_source_count_where_its_blend_has_epochs():
    blend = [{"path": "a", "epochs": 1}, {"epochs": 2, "sources": [{"path": "b", "epochs": 3}]}]
    assert len(Settings(model={"hf": "x"}, data={"train": blend}).data.leaves) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=[{path: a, max_tokens: 5}, {path: b, max_tokens: 5}]"], "all sources have max_tokens"),
        (
            ["data.train=[{path: a, max_tokens: 5}, {path: b}]", "train.epochs=1"],
            "'a' has max_tokens, but train.ep",
        ),
        (["data.train=[{max_tokens: 5, sources: [{path: a}, {path: b}]}, {path: c}]"], "a blend has max_tokens"),
    ],
)
def test_a_source_that_ends_needs_one_that_goes_on(refused, overrides, message):
    assert message in refused(HF, *overrides).message


def numbers(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """An override for every setting that takes a number with decimals; VALUE stands for the number."""
    for name, field in model.model_fields.items():
        key, section, item = prefix + (field.alias or name), describe.section_class(field), describe.item_class(field)
        annotation, inner = str(field.annotation), section or item
        if inner is DataSource:
            yield from (f"{key}=[{{path: a, {name}: VALUE}}]" for name in ("weight", "epochs"))
        elif inner is RewardSettings:
            yield from (f"{key}=[{{name: exact, {name}: VALUE}}]" for name in ("weight", "timeout"))
        elif inner is GroupSettings:
            yield from (f"{key}=[{{match: a, {name}: VALUE}}]" for name in ("lr_scale", "weight_decay"))
        elif inner is not None:
            yield from numbers(inner, key + ".")
        elif get_origin(field.annotation) is dict and "float" in annotation:
            yield f"{key}={{vision: VALUE}}"
        elif "float" in annotation:
            yield f"{key}=VALUE"


NUMBERS = list(numbers())


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1" + 400 * "0", "1.0e400"])
@pytest.mark.parametrize("override", NUMBERS)
def test_no_number_may_be_infinite_or_nan(override, value, refused):
    error = refused(HF, override.replace("VALUE", value))
    assert override.partition("=")[0] in error.message
    assert "allowed: " in error.message


def test_every_number_is_tried():
    """By another way: the words that help and messages have for them."""
    written = [entry.key for entry in describe.entries() if re.search(r"(?<!whole )number", entry.allowed)]
    assert set(written) <= {override.partition("=")[0] for override in NUMBERS}
    assert {"data.train", "data.replay.sources"} <= {override.partition("=")[0] for override in NUMBERS}
    assert len(written) > 15


def test_what_is_frozen_in_which_step():
    settings = Settings(model={"hf": "x", "freeze": ["vision", "language"]}, train={"unfreeze_after": {"language": 2}})
    assert settings.frozen(2) == ["vision", "language"]
    assert settings.frozen(3) == settings.frozen() == ["vision"]


def test_context_parallelism_needs_two_pieces_for_each_rank(refused):
    error = refused(HF, "data.seq_length=40", "parallel.context=4", "parallel.tensor=2")
    assert "not divisible by 2 × parallel.context × parallel.tensor = 16" in error.message
    assert error.remedy == "the nearest valid lengths are 32 and 48"


def test_samples_are_padded_to_what_context_parallelism_needs():
    settings = lambda **data: Settings(model={"hf": "x"}, parallel={"context": 4}, data=data)
    assert Settings(model={"hf": "x"}).pad_multiple == 1
    assert settings().pad_multiple == 8
    assert settings(pad_multiple=16).pad_multiple == 16


def test_sequence_parallelism_is_off_without_tensor_parallelism():
    assert not Settings(model={"hf": "x"}).parallel.sequence_parallel
    assert Settings(model={"hf": "x"}, parallel={"tensor": 2}).parallel.sequence_parallel
    assert not Settings(model={"hf": "x"}, parallel={"tensor": 2, "sequence": False}).parallel.sequence_parallel


def test_settings_are_final():
    with pytest.raises(ValueError, match="frozen"):
        Settings(model={"hf": "x"}).train.steps = 3


def test_every_setting_has_default_range_and_meaning():
    entries = list(describe.entries())
    assert len({entry.key for entry in entries}) == len(entries) > 40
    for entry in entries:
        assert entry.meaning, entry.key
        assert entry.allowed, entry.key
        assert entry.default, entry.key
    assert [entry.key for entry in entries if entry.default == "required"] == ["model.hf"]
    by_key = {entry.key: entry for entry in entries}
    assert by_key["checkpoint.async"].allowed == "true | false"
    assert by_key["generate.top_p"].allowed == "number > 0 and ≤ 1"
    assert by_key["train.lr_scale"].allowed == "{vision | projector | language: number > 0}"
    assert by_key["adapter.rank_pattern"].allowed == "{text: whole number ≥ 1}"
    assert by_key["log.wandb.mode"].section == "log"


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (None, []),
        ("x/a.jsonl", ["a"]),
        ("s3://bucket/shards/", ["shards"]),
        ([{"path": "a.jsonl"}, {"path": "b.jsonl", "name": "c"}], ["a", "c"]),
    ],
)
def test_held_out_data_is_one_path_or_several_sources(given, labels):
    settings = Settings(model={"hf": "folder"}, data={"eval": given})
    assert [source.label for source in settings.data.eval] == labels
    again = Settings(**settings.model_dump(by_alias=True))
    assert again == settings
    best = f"eval/{labels[-1]}/loss" if len(labels) > 1 else "eval/loss"
    if labels:
        assert Settings(model={"hf": "folder"}, data={"eval": given}, eval={"every": 5, "best": best}).eval.best == best


@pytest.mark.parametrize(
    ("given", "minutes"), [({}, 30.0), ({"every": 100}, None), ({"every_epochs": 1}, None), ({"every_minutes": 5}, 5.0)]
)
def test_a_run_without_settings_for_checkpoints_loses_at_most_half_an_hour(given, minutes):
    assert CheckpointSettings(**given).minutes == minutes
