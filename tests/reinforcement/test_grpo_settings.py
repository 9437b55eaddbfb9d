"""Settings of grpo that contradict each other or would be ignored."""

import pytest
import torch

from megavlm.align.loss_tables import advantages_of, losses_of
from megavlm.align.losses import advantages, check_policy
from megavlm.align.registry import METHODS, check_method, make_method
from megavlm.base.errors import UserError
from megavlm.config.requirements import check_required
from megavlm.config.settings import Settings
from megavlm.layout.shapes import check_prompts
from megavlm.reinforcement.grpo import Policy

REWARD = [{"name": "exact"}]
DOOR = {"python": "doors.py:Door", "max_tokens": 40}
GOOD = {
    "model": {"hf": "folder", "load": "folder"},
    "data": {"seq_length": 64},
    "rollout": {"prompts": 8, "max_new_tokens": 32},
    "reward": REWARD,
}


def settings(**sections) -> Settings:
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in GOOD.items()}
    for name, value in sections.items():
        merged[name] = {**merged.get(name, {}), **value}
    return Settings(**merged)


def test_the_names_are_those_of_the_tables():
    """Every entry names a function, and a wrong name is refused before torch is loaded."""
    assert losses_of("grpo")[0] == "grpo"
    assert losses_of("ppo") == ("ppo",)
    for name in losses_of("grpo") + losses_of("ppo"):
        assert callable(check_policy(name, {}).function)
    for name in advantages_of("grpo"):
        assert advantages(name, torch.tensor([1.0, 0.0]), 2)[0] > 0
    for name in ("loss", "advantage"):
        with pytest.raises(UserError, match=f"align.{name} is none, which is no {name} of grpo"):
            check_method("grpo", settings(align={name: "none"}))


BAD = {
    "a loss of dpo": ({"align": {"loss": "sigmoid"}}, "no loss of grpo"),
    "the loss of ppo": ({"align": {"loss": "ppo"}}, "no loss of grpo"),
    "an unknown advantage": ({"align": {"advantage": "gae"}}, "choose one of grpo, dr_grpo, rloo"),
    "an option of another loss": ({"align": {"loss": "sapo", "epsilon": 0.1}}, "epsilon"),
    "an option of another advantage": ({"align": {"advantage": "rloo", "ddof": 0}}, "align.ddof"),
    "an option of dpo": ({"align": {"label_smoothing": 0.1}}, "label_smoothing"),
    "a reference file": ({"align": {"reference": "file"}}, "align.reference"),
    "a limit without correction": ({"align": {"correction_highest": 2.0}}, "correction_highest"),
    "a lower limit of a truncation": (
        {"align": {"correction": "token_truncate", "correction_lowest": 0.5}},
        "correction_lowest",
    ),
    "an idle reference without one": ({"align": {"beta": 0.0, "offload": ["reference"]}}, "no reference model"),
    "a divergence of nothing": (
        {"align": {"loss": "dapo", "kl_in": "reward"}, "rollout": {"replace_flat": 0}},
        "kl_in",
    ),
    "flat groups that differ": ({"align": {"kl_in": "reward"}, "rollout": {"replace_flat": 1}}, "replace_flat"),
    "a penalty longer than the answer": ({"align": {"overlong_cache": 33}}, "overlong_cache"),
    "no room for a prompt": ({"rollout": {"max_new_tokens": 64}}, "data.seq_length"),
    "rows of a step": ({"train": {"global_batch_size": 8}}, "global_batch_size"),
    "truncated prompts": ({"data": {"too_long": "truncate"}}, "never truncated"),
    "packing": ({"data": {"packing": "none"}}, "data.packing"),
    "a packing buffer": ({"data": {"packing_buffer": 7}}, "packing_buffer"),
    "no room for a prompt and a conversation": ({"environment": {**DOOR, "max_tokens": 64}}, "environment.max_tokens"),
    "a penalty for long answers in several turns": (
        {"environment": DOOR, "align": {"overlong_cache": 3}},
        "align.overlong_cache",
    ),
    "random weights as reference": ({"model": {"load": "random"}}, "model.load"),
    "fp8": ({"train": {"precision": "fp8"}, "model": {"kernels": "te"}}, "fp8"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_without_effect_or_sense_are_refused(case):
    sections, words = BAD[case]
    with pytest.raises(UserError) as caught:
        make_method("grpo", settings(**sections))
    assert words in f"{caught.value.message} {caught.value.remedy}"


def test_a_conversation_has_the_room_that_an_environment_needs():
    assert settings().answer_tokens == 32
    assert settings(environment=DOOR).answer_tokens == 40
    assert Policy.of(settings(environment=DOOR, align={"loss": "dr_grpo"})).options.max_length == 40


BAD_ENVIRONMENTS = {
    "ignored": ({"max_turns": 3}, "environment.max_turns is 3, but there is no environment"),
    "no name": ({"python": "doors.py", "max_tokens": 40}, "which is not FILE.py:NAME"),
    "no budget": ({"python": "doors.py:Door"}, "environment.max_tokens is not set"),
    "a budget below one answer": ({**DOOR, "max_tokens": 31}, "less than a single answer may have"),
}


@pytest.mark.parametrize("case", BAD_ENVIRONMENTS)
def test_bad_environments_are_refused(case):
    section, words = BAD_ENVIRONMENTS[case]
    with pytest.raises(ValueError, match=words):
        settings(environment=section)


def test_an_environment_may_be_the_only_reward():
    needed = METHODS["grpo"].requires
    check_required(Settings(**{**GOOD, "reward": [], "environment": DOOR}), needed, "grpo")
    check_required(Settings(**GOOD), needed, "grpo")
    with pytest.raises(UserError, match=r"reward \(.*\) or environment.python \("):
        check_required(Settings(**{**GOOD, "reward": []}), needed, "grpo")
    nothing = [{"name": "exact", "weight": 0.0}]
    with pytest.raises(ValueError, match="all rewards have weight 0"):
        Settings(**{**GOOD, "reward": nothing, "environment": {**DOOR, "weight": 0.0}})
    Settings(**{**GOOD, "reward": nothing, "environment": DOOR})
    with pytest.raises(ValueError, match="a reward has the name environment"):
        Settings(**{**GOOD, "reward": [{"name": "exact", "label": "environment"}], "environment": DOOR})


def test_good_settings_are_accepted_with_the_defaults_of_their_loss():
    assert make_method("grpo", settings()).title == "reinforcement learning · grpo"
    policy = Policy.of(settings(align={"loss": "dapo"}))
    assert (policy.options.beta, policy.advantage, policy.replacements) == (0.0, ("grpo", {}), 4)
    policy = Policy.of(settings(align={"loss": "dr_grpo"}, rollout={"replace_flat": 2}))
    assert (policy.options.max_length, policy.advantage[0], policy.replacements) == (32, "dr_grpo", 2)
    assert Policy.of(settings(align={"ddof": 0})).advantage == ("grpo", {"ddof": 0.0})


@pytest.mark.parametrize(
    "section",
    [
        {"rollout": {"prompts": 2}},
        {"reward": REWARD},
        {"reward_pool": {"workers": 3}},
        {"environment": {**DOOR, "max_tokens": 2000}},
    ],
)
@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_other_methods_refuse_the_sections_of_sampling(verb, section):
    with pytest.raises(UserError, match=next(iter(section))):
        check_method(verb, Settings(model={"hf": "folder"}, **section))


@pytest.mark.parametrize("verb", ["kto", "rm", "dpo"])
@pytest.mark.parametrize("align", [{"updates": 2}, {"advantage": "rloo"}, {"mask_truncated": True}, {"beta": 0.0}])
def test_other_methods_refuse_the_options_of_grpo(verb, align):
    with pytest.raises(UserError, match=next(iter(align))):
        make_method(verb, Settings(model={"hf": "folder", "load": "folder"}, align=align))


def test_prompts_are_divided_evenly_among_ranks_and_mini_batches():
    check_prompts(8, 2, 4)
    with pytest.raises(UserError) as caught:
        check_prompts(8, 4, 4)
    assert "4 data-parallel ranks and align.mini_batches = 4" in caught.value.message
    assert "16" in caught.value.remedy


def test_what_needs_no_table_of_losses_is_refused_before_the_method_is_imported():
    """By the command, before it starts processes or imports torch (tests/cli/test_cli.py looks that it does not)."""
    for case in (
        "no room for a prompt",
        "rows of a step",
        "a limit without correction",
        "fp8",
        "flat groups that differ",
    ):
        sections, words = BAD[case]
        with pytest.raises(UserError, match=words):
            check_method("grpo", settings(**sections))
