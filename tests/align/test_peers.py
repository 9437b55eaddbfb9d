"""Policy losses, advantages, GAE, divergences and corrections beside the functions of TRL and verl, in float64.

`make` unpacks both packages into ``.venv/peers`` without what they depend on (3 MB instead of gigabytes). To import
them would need all that, so a function is compiled by itself, as it stands in their files, and called with the names
that it uses. Where they compute something else, the test says so:

- TRL's means over answers count an answer without target tokens, ours and verl's do not. TRL's advantages are a part
  of the sampling there and cannot be called.
- verl adds 1e-8 to the number of tokens of an answer, and always has a dual clip (3 unless it is given).
- verl limits the ratio of cispo on both sides, and its epsilon_high is the distance from 1.
- verl whitens the advantages of GAE; we return them as they are. Its returns are the same.
- verl does not know answers without a reward, divides the rounding error of equal rewards by epsilon and gives the only
  answer to a prompt its reward as advantage; ours are 0.
"""

import ast
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import torch

from megavlm.align.losses import advantages, correction, gae, kl_estimate, policy_loss

PEERS = Path(sys.prefix) / "peers"
B, T = 6, 9
LENGTHS = (9, 3, 1, 5, 7, 2)  # target tokens of each answer
TRL_LOSSES = {  # name: (loss and options of ours, those of TRL's trainer)
    "grpo": ({"beta": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    "grpo, dual clip": ({"beta": 0.0, "dual_clip": 2.0}, {"loss_type": "grpo", "delta": 2.0}),
    "dr_grpo": ({"max_length": 20}, {"loss_type": "dr_grpo"}),
    "dapo": ({}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        {"epsilon": 0.05, "epsilon_high": 0.1},
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1,
        },
    ),
    "sapo": ({"beta": 0.05}, {"loss_type": "sapo", "beta": 0.05}),
    "cispo": ({"epsilon_high": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
}  # fmt: skip
VERL_LOSSES = {  # name: (options of ours, verl's function, its aggregation, its configuration)
    "ppo": ({"dual_clip": 3.0}, "vanilla", "token-mean", {}),
    "grpo": ({"beta": 0.0, "dual_clip": 1.5}, "vanilla", "seq-mean-token-mean", {"clip_ratio_c": 1.5}),
    "dr_grpo": ({"dual_clip": 3.0}, "vanilla", "seq-mean-token-sum-norm", {}),
    "dapo": ({"dual_clip": 10.0}, "vanilla", "token-mean", {"clip_ratio_high": 0.28, "clip_ratio_c": 10.0}),
    "gspo": (
        {"epsilon": 0.05, "epsilon_high": 0.1}, "gspo", "seq-mean-token-mean",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1},
    ),
    "sapo": ({}, "sapo", "seq-mean-token-mean", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": ({"epsilon_high": 1.2}, "cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.2}),
}  # fmt: skip
pytestmark = pytest.mark.skipif(not PEERS.is_dir(), reason="TRL and verl are not in .venv/peers: run make test")


def taken(file: str, *names: str, **known: Any) -> dict[str, Any]:
    """Functions, also methods, with these names from a file of a peer. ``known`` are names that they use."""
    namespace: dict[str, Any] = {"torch": torch, "np": np, "math": math, "Optional": Optional, "Any": Any} | known
    for node in ast.walk(ast.parse((PEERS / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []  # they only register the functions
            exec(compile(ast.Module([node], []), file, "exec"), namespace)
    assert not [name for name in names if name not in namespace], file
    return namespace


class _Config(SimpleNamespace):
    def get(self, name: str, default: float) -> float:
        return getattr(self, name, default)


@pytest.fixture(scope="module")
def verl() -> SimpleNamespace:
    helpers = SimpleNamespace(
        **taken("verl/utils/torch_functional.py", "masked_sum", "masked_mean", "masked_var", "masked_whiten")
    )
    losses = [f"compute_policy_loss_{name}" for name in ("vanilla", "gspo", "sapo", "cispo")]
    others = ["compute_gae_advantage_return", "compute_rloo_outcome_advantage", "compute_grpo_outcome_advantage"]
    known = {
        "verl_F": helpers, "ActorConfig": _Config, "AlgoConfig": type("Other", (), {}), "DictConfig": _Config,
        "defaultdict": defaultdict,
    }  # fmt: skip
    core = taken("verl/trainer/ppo/core_algos.py", *losses, *others, "agg_loss", "kl_penalty_forward", **known)
    weights = taken(
        "verl/trainer/ppo/rollout_corr_helper.py", "_parse_rollout_is_threshold", "compute_rollout_correction_weights",
        verl_F=helpers, SAFETY_BOUND=20.0, compute_is_metrics=lambda **_: {},
    )  # fmt: skip
    return SimpleNamespace(**core, correction_weights=weights["compute_rollout_correction_weights"])


@pytest.fixture(scope="module")
def trl_loss():
    smallest = lambda x: x.min()
    return taken("trl/trainer/grpo_trainer.py", "_compute_loss", nanmin=smallest, nanmax=smallest)["_compute_loss"]


def batch(seed: int = 0):
    """logprobs, old, reference [B, T] whose ratios lie on both sides of all limits, advantages [B], mask; float64."""
    made = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64)
    old = -draw(B, T).abs() - 0.1
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()
    return (old + 0.5 * draw(B, T)).requires_grad_(), old, old + 0.3 * draw(B, T), draw(B), mask


def some_weights() -> torch.Tensor:
    """Weights of a correction, [B, T]."""
    return torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(loss: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logprobs)[0]


def is_same(found: torch.Tensor, theirs: torch.Tensor, logprobs: torch.Tensor, tolerance: float) -> None:
    assert found.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)
    assert torch.allclose(gradient(found, logprobs), gradient(theirs, logprobs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("case", TRL_LOSSES)
def test_losses_are_trls(case, with_weights, trl_loss):
    """To 1e-13: the same operations in another order."""
    options, settings = TRL_LOSSES[case]
    logprobs, old, reference, advantage, mask = batch()
    weights = some_weights() if with_weights else None
    if weights is not None and case == "gspo":
        weights = weights[:, :1].expand(B, T)
    same = lambda value, **_: value
    trainer = SimpleNamespace(**{
        "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "max_completion_length": 20, "current_gradient_accumulation_steps": 1, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "use_vllm": with_weights, "vllm_importance_sampling_correction": True,
        "model": SimpleNamespace(training=True), "_metrics": defaultdict(lambda: defaultdict(list)),
        "accelerator": SimpleNamespace(num_processes=1, reduce=same, gather=same),
        "args": SimpleNamespace(
            use_bias_correction_kl=False, delta=settings.get("delta"), steps_per_generation=1,
            # as tensors, because PyTorch would make float32 of numbers here
            sapo_temperature_pos=torch.ones((), dtype=old.dtype), sapo_temperature_neg=torch.full_like(old[0, 0], 1.05),
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(old), None),
        **settings,
    })  # fmt: skip
    nothing = torch.zeros(B, T)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": nothing, "completion_mask": mask,
        "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": weights,
    }  # fmt: skip
    theirs = trl_loss(trainer, None, inputs)
    name = case.partition(",")[0]
    found, _ = policy_loss(name, logprobs, old, advantage[:, None], mask, reference, weights=weights, **options)
    is_same(found, theirs, logprobs, 1e-13)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("name", VERL_LOSSES)
def test_losses_are_verls(name, with_weights, verl):
    """To 1e-13, and to 2e-8 where verl divides by the number of tokens + 1e-8."""
    options, function, mode, config = VERL_LOSSES[name]
    logprobs, old, _, advantage, mask = batch(2)
    weights = some_weights() if with_weights else None
    config = _Config(**{
        "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "global_batch_info": {}, **config,
    })  # fmt: skip
    make = getattr(verl, f"compute_policy_loss_{function}")
    theirs, metrics = make(old, logprobs, advantage[:, None].expand(B, T), mask, mode, config, weights)
    found, ours = policy_loss(name, logprobs, old, advantage[:, None], mask, weights=weights, **options)
    is_same(found, theirs, logprobs, 2e-8 if mode == "seq-mean-token-mean" else 1e-13)
    if name != "sapo":  # 1e-8 again, in the mean; with a dual clip, verl counts what it limits apart
        shares = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
        assert ours["clip_share"].item() == pytest.approx(shares, rel=1e-6)
        assert shares > 0


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_divergences_are_verls(name, verl):
    """verl limits k3 itself, too, to 10, which these do not reach."""
    logprobs, _, reference, _, _ = batch(3)
    found, theirs = kl_estimate(name, logprobs, reference), verl.kl_penalty_forward(logprobs, reference, name)
    assert torch.allclose(found, theirs, atol=1e-15, rtol=1e-13)
    assert torch.allclose(gradient(found.sum(), logprobs), gradient(theirs.sum(), logprobs), atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("grpo", "grpo", {}),
        ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
    ],
)
def test_advantages_are_verls(name, function, options, verl):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    at_the_end = torch.zeros(12, T, dtype=torch.float64)
    at_the_end[:, -1] = rewards
    index, mask = np.repeat(np.arange(3), 4), torch.ones(12, T, dtype=torch.float64)
    theirs, _ = getattr(verl, f"compute_{function}_outcome_advantage")(at_the_end, mask, index, **options)
    assert torch.allclose(advantages(name, rewards, 4), theirs[:, 0], atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_verls(gamma, lam, verl):
    made = torch.Generator().manual_seed(5)
    rewards, values = (torch.randn(B, T, generator=made, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, T, generator=made) < 0.7  # also tokens between those that were sampled
    found, returns = gae(rewards, values, mask, gamma, lam)
    whitened, their_returns = verl.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    assert torch.allclose(returns[mask], their_returns[mask], atol=1e-13, rtol=1e-13)
    mine = (found - found[mask].mean()) / (found[mask].var() + 1e-8).sqrt()
    assert torch.allclose(mine[mask], whitened[mask], atol=1e-8, rtol=1e-8)  # of verl's mean


@pytest.mark.parametrize(
    ("name", "level", "threshold"),
    [("token_truncate", "token", 2.0), ("token_mask", "token", "0.5_5.0"), ("sequence_truncate", "sequence", 3.0),
     ("sequence_mask", "sequence", "0.2_3.0")],
)  # fmt: skip
def test_corrections_are_verls(name, level, threshold, verl):
    _, old, _, _, mask = batch(6)
    sampler = old + 0.6 * torch.randn(B, T, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    limits = {"lowest": 0.2} if name == "sequence_mask" else {}  # ours is 0 unless it is given
    found, metrics = correction(name, old, sampler, mask, **limits)
    theirs, _ = verl.correction_weights((old - sampler) * mask, mask, level, threshold)
    assert torch.allclose(found * mask, theirs, atol=1e-15, rtol=1e-13)
    assert metrics["corrected_share"] > 0
