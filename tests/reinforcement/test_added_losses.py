"""The examples of docs/adding.md: a loss of sampled answers and an advantage are a function and a line each."""

import importlib

import pytest
import torch
from test_grpo_settings import settings

from megavlm.align.loss_tables import ADVANTAGES, POLICY_LOSSES, PolicyLoss
from megavlm.align.losses import advantages, policy_loss
from megavlm.align.registry import check_method, make_method
from megavlm.reinforcement.policy import Policy


def test_a_policy_loss_is_added_by_one_function_and_one_line(monkeypatch):
    def plain(ratio, advantages, logprobs, *, epsilon_high=10.0):
        return -ratio.clamp(max=epsilon_high) * advantages, ratio > epsilon_high

    monkeypatch.setattr("megavlm.align.losses.policy.plain", plain, raising=False)
    monkeypatch.setitem(POLICY_LOSSES, "plain", PolicyLoss("plain", ratio="token", reduction="token", beta=0.0))
    ratios = torch.tensor([[0.5, 3.0], [1.5, 9.0]], dtype=torch.float64)
    advantage, mask = torch.tensor([[2.0], [-1.0]], dtype=torch.float64), torch.tensor([[1, 1], [1, 0]])
    loss, metrics = policy_loss("plain", ratios.log(), torch.zeros_like(ratios), advantage, mask, epsilon_high=2.0)
    assert loss.item() == pytest.approx((-0.5 * 2 - 2 * 2 + 1.5) / 3, abs=1e-9)
    assert metrics["clip_share"].item() == pytest.approx(1 / 3)
    given = settings(align={"loss": "plain", "epsilon_high": 2.0})
    check_method("grpo", given)  # what the command asks before torch is loaded
    make_method("grpo", given)
    assert Policy.of(given).options.loss == "plain"
    assert Policy.of(given).options.options == {"epsilon_high": 2.0}


def test_an_advantage_is_added_by_one_function_and_one_line(monkeypatch):
    def best(rewards, known):
        return torch.where(known, rewards - rewards.amax(-1, keepdim=True), 0.0)

    # a function of this name stands before its module in the package
    monkeypatch.setattr(importlib.import_module("megavlm.align.losses.advantages"), "best", best, raising=False)
    monkeypatch.setitem(ADVANTAGES, "best", "best")
    assert advantages("best", torch.tensor([1.0, 0.25, 0.5, 0.5]), 2).tolist() == [0.0, -0.75, 0.0, 0.0]
    given = settings(align={"advantage": "best"})
    check_method("grpo", given)
    make_method("grpo", given)
    assert Policy.of(given).advantage == ("best", {})
