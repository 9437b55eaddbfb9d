"""The registry alone says what a method is called, what its runs leave behind, and which settings are meant for it."""

import pytest

from megavlm.align.registry import METHODS, meant, trained_by, usual
from megavlm.commands.plan_words import verb_of
from megavlm.config.settings import Settings

VALUES = {  # of a setting that is meant for a method
    "stage": 0,
    "align.centering": 0.1,
    "align.desirable_weight": 2.0,
    "align.undesirable_weight": 2.0,
    "rollout.prompts": 8,
    "reward": [{"name": "exact"}],
    "environment.python": "games.py:Game",
    "align.loss=ppo": "ppo",
    "align.critic": {"lr": 1e-5},
    "align.discount": 0.9,
}


def with_setting(key: str) -> Settings:
    tree = VALUES[key]
    for part in reversed(key.partition("=")[0].split(".")):
        tree = {part: tree}
    if key == "environment.python":
        tree["environment"]["max_tokens"] = 2048  # an environment must have both
    return Settings(model={"hf": "hf"}, **tree)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_recognised_by_what_it_leaves_behind(name):
    method = METHODS[name]
    assert trained_by({"step", "loss", *method.marks}, has_stage=method.has_stages) == name
    assert [other for other in METHODS.values() if other.named == method.named] == [method]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, method in METHODS.items() for key in method.meant_by])
def test_a_setting_tells_for_which_method_it_is_meant(name, key):
    assert meant(with_setting(key)) == (name, key.partition("=")[0])


def test_settings_that_every_method_has_are_meant_for_none():
    assert meant(Settings(model={"hf": "hf"})) is None
    assert meant(Settings(model={"hf": "hf"}, align={"loss": "ipo", "beta": 0.2})) is None


def test_a_method_is_looked_at_before_those_that_it_builds_on():
    sampled = {"rollout": {"prompts": 8}}
    assert meant(Settings(model={"hf": "hf"}, **sampled)) == ("grpo", "rollout.prompts")
    assert meant(Settings(model={"hf": "hf"}, align={"discount": 0.9}, **sampled)) == ("ppo", "align.discount")


def test_data_suggest_a_method():
    assert {kind: usual(kind) for kind in ("pretrain", "tune", "pair", "judged", "prompt")} == {
        "pretrain": "pretrain",
        "tune": "sft",
        "pair": "dpo",
        "judged": "kto",
        "prompt": "grpo",
    }


def test_a_plan_without_a_verb_takes_the_one_that_is_meant():
    assert verb_of(Settings(model={"hf": "hf"})) == "sft"
    assert verb_of(with_setting("align.centering")) == "rm"
    assert verb_of(with_setting("rollout.prompts")) == "grpo"
    assert verb_of(with_setting("reward")) == "sft"  # without rollout.prompts nothing can be sampled
