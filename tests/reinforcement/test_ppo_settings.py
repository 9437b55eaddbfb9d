"""Settings of ppo that contradict each other or would be ignored."""

import pytest
from test_grpo_settings import settings

from megavlm.align.registry import check_method, make_method
from megavlm.align.sampling_checks import with_group_size
from megavlm.base.errors import UserError
from megavlm.reinforcement.critic import train_of_critic
from megavlm.reinforcement.policy import Policy

BAD = {
    "a loss of grpo": ({"align": {"loss": "dapo"}}, "no loss of ppo"),
    "an advantage of grpo": ({"align": {"advantage": "rloo"}}, "choose one of gae"),
    "an option of an advantage of grpo": ({"align": {"ddof": 0}}, "align.ddof"),
    "an option of another loss": ({"align": {"tau_pos": 1.5}}, "align.tau_pos"),
    "an option of dpo": ({"align": {"gamma": 0.5}}, "align.gamma"),
    "flat groups": ({"rollout": {"replace_flat": 2}}, "replace_flat"),
    "a divergence of nothing": ({"align": {"beta": 0.0, "kl_in": "reward"}}, "kl_in"),
    "an idle reference without one": ({"align": {"beta": 0.0, "offload": ["reference"]}}, "no reference model"),
    "an idle reward model without one": ({"align": {"offload": ["reward"]}}, "no reward is a model"),
    "a part that is unfrozen": (
        {"train": {"unfreeze_after": {"vision": 2}}, "model": {"freeze": ["vision"]}},
        "unfreeze_after",
    ),
    "GaLore": ({"train": {"optimizer": "galore"}}, "galore"),
    "Muon": ({"train": {"optimizer": "muon"}}, "muon"),
    "a policy that never learns": ({"train": {"steps": 5}, "align": {"critic": {"alone_steps": 5}}}, "alone_steps"),
    "random weights": ({"model": {"load": "random"}, "align": {"beta": 0.0}}, "critic could start"),
    "rows of a step": ({"train": {"global_batch_size": 8}}, "ppo packs its answers"),
}
BAD_FOR_GRPO = {
    "a critic": ({"align": {"critic": {"lr": 1e-5}}}, "align.critic"),
    "a discount": ({"align": {"discount": 0.9}}, "align.discount"),
    "a lambda": ({"align": {"gae_lambda": 0.9}}, "align.gae_lambda"),
    "an idle critic": ({"align": {"offload": ["critic"]}}, "grpo has no critic"),
    "one answer": ({"rollout": {"group_size": 1}}, "megavlm ppo"),
}


@pytest.mark.parametrize(("verb", "case"), [("ppo", case) for case in BAD] + [("grpo", case) for case in BAD_FOR_GRPO])
def test_settings_without_effect_or_sense_are_refused(verb, case):
    sections, words = (BAD if verb == "ppo" else BAD_FOR_GRPO)[case]
    with pytest.raises(UserError) as caught:
        make_method(verb, settings(**sections))
    assert words in f"{caught.value.message} {caught.value.remedy}"


def test_good_settings_are_accepted_with_their_defaults():
    assert make_method("ppo", settings()).title == "reinforcement learning · ppo, advantage gae"
    policy = Policy.of(settings(), "ppo")
    assert (policy.options.loss, policy.options.beta, policy.kl_in_reward) == ("ppo", 0.0, 0.05)
    assert policy.has_critic
    policy = Policy.of(settings(align={"kl_in": "loss", "beta": 0.2, "dual_clip": 3.0}), "ppo")
    assert (policy.options.beta, policy.kl_in_reward, policy.options.options) == (0.2, 0.0, {"dual_clip": 3.0})
    sizes = [with_group_size(settings(), verb).rollout.group_size for verb in ("grpo", "ppo")]
    assert sizes == [16, 1]
    assert with_group_size(settings(rollout={"group_size": 5}), "ppo").rollout.group_size == 5


def test_the_critic_has_a_schedule_of_its_own():
    train = {"lr": 1e-6, "min_lr": 1e-7, "warmup_steps": 3, "steps": 20}
    of_critic = train_of_critic(settings(train=train))
    assert (of_critic.lr, of_critic.min_lr, of_critic.warmup_steps) == (1e-6, pytest.approx(1e-7), 3)
    of_critic = train_of_critic(settings(train=train, align={"critic": {"lr": 1e-5, "warmup_steps": 0}}))
    assert (of_critic.lr, of_critic.min_lr, of_critic.warmup_steps) == (1e-5, pytest.approx(1e-6), 0)


def test_what_needs_no_table_of_losses_is_refused_before_the_method_is_imported():
    for case in ("flat groups", "GaLore", "a policy that never learns", "rows of a step"):
        sections, words = BAD[case]
        with pytest.raises(UserError, match=words):
            check_method("ppo", settings(**sections))
