"""Policy losses, advantages, GAE, estimates of the divergence and corrections: values worked out token by token."""

import math
import random

import pytest
import torch

from megavlm.align.loss_tables import POLICY_LOSSES
from megavlm.align.losses import advantages, correction, gae, kl_estimate, policy_loss
from megavlm.align.losses.policy import token_losses
from megavlm.align.losses.reductions import REDUCTIONS

B, T = 6, 7
LENGTHS = (7, 3, 1, 5, 0, 2)  # target tokens of each answer; one has none
OPTIONS = {
    "ppo": [{}, {"dual_clip": 2.0}, {"epsilon": 0.1, "epsilon_high": 0.4, "beta": 0.5}],
    "grpo": [{}, {"beta": 0.0}],
    "dr_grpo": [{}, {"max_length": 40}],
    "dapo": [{}, {"dual_clip": 3.0}],
    "gspo": [{}, {"epsilon": 0.05, "epsilon_high": 0.1}],
    "sapo": [{}, {"tau_pos": 0.5, "tau_neg": 3.0}],
    "cispo": [{}, {"epsilon_high": 1.2}],
}
CASES = [(name, options) for name in POLICY_LOSSES for options in OPTIONS[name]]


def batch(seed: int = 0):
    """logprobs, old, ref [B, T] whose ratios lie on both sides of all limits, advantages [B, T], mask; float64."""
    made = torch.Generator().manual_seed(seed)
    draw = lambda spread: spread * torch.randn(B, T, generator=made, dtype=torch.float64)
    old = -draw(1.0).abs() - 0.1
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    one_each = draw(1.0)[:, :1].expand(B, T)
    return (old + draw(0.4)).requires_grad_(), old, old + draw(0.3), one_each, mask


def by_hand(name, logprobs, old, ref, advantage, mask, beta=None, max_length=T, **options):
    """Loss and its gradient [B, T], with Python's floats."""
    defaults = {"epsilon": 0.2, "epsilon_high": {"dapo": 0.28, "cispo": 5.0, "gspo": 4e-4}.get(name)}
    if name == "gspo":
        defaults["epsilon"] = 3e-4
    o = defaults | {"dual_clip": None, "tau_pos": 1.0, "tau_neg": 1.05} | options
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    beta = beta if beta is not None else 0.03 if name == "grpo" else 0.0
    total, gradient, answers = 0.0, [[0.0] * T for _ in range(B)], sum(n > 0 for n in LENGTHS)
    for b, length in enumerate(LENGTHS):
        log = [(logprobs[b][t] - old[b][t]) for t in range(length)]
        for t in range(length):
            r = math.exp(sum(log) / length if name == "gspo" else log[t])
            a, lp = advantage[b][t], logprobs[b][t]
            if name == "sapo":
                tau = o["tau_pos"] if a > 0 else o["tau_neg"]
                gate = 1 / (1 + math.exp(-tau * (r - 1)))
                loss, slope = -a * 4 / tau * gate, -a / math.cosh(tau * (r - 1) / 2) ** 2 * r
            elif name == "cispo":
                loss, slope = -min(r, high) * a * lp, -min(r, high) * a
            else:
                limited = min(max(r, 1 - o["epsilon"]), 1 + high)
                loss, slope = (-r * a, -r * a) if -r * a >= -limited * a else (-limited * a, 0.0)
                if o["dual_clip"] and a < 0 and loss > -o["dual_clip"] * a:
                    loss, slope = -o["dual_clip"] * a, 0.0
            k1 = lp - ref[b][t]
            loss, slope = loss + beta * (math.exp(-k1) + k1 - 1), slope + beta * (1 - math.exp(-k1))
            share = {
                "token": 1 / sum(LENGTHS), "sequence": 1 / (length * answers), "constant": 1 / (B * max_length),
            }[POLICY_LOSSES[name].reduction]  # fmt: skip
            total, gradient[b][t] = total + share * loss, share * slope
    return total, gradient


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_loss_and_its_gradient_are_those_worked_out_by_hand(name, options):
    logprobs, old, ref, advantage, mask = batch()
    expected, gradient = by_hand(name, *(x.tolist() for x in (logprobs, old, ref, advantage, mask)), **options)
    loss, metrics = policy_loss(name, logprobs, old, advantage, mask, ref, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-9, rtol=0)
    of_answers, _ = policy_loss(name, logprobs, old, advantage[:, :1], mask, ref, **options)
    assert of_answers.item() == loss.item()
    k3 = [math.exp(-k1) + k1 - 1 for k1 in (logprobs - ref)[mask].tolist()]
    assert metrics["kl"].item() == pytest.approx(sum(k3) / len(k3), abs=1e-9)
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_of_the_ratio():
    old, mask = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[True, True, True, False]])
    ratios = torch.tensor([[1.5, 0.5, 1.0, 9.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    _, metrics = policy_loss("ppo", ratios.log(), old, advantage, mask)  # 0.5 with A > 0 is not limited
    expected = {"ratio_mean": 1.0, "ratio_max": 1.5, "clip_share": 1 / 3}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_how_a_batch_is_cut_has_no_influence(name):
    """Sums and counts of the parts add up to the loss of the whole, and so do gradients."""
    logprobs, old, ref, advantage, mask = batch(1)
    whole, _ = policy_loss(name, logprobs, old, advantage, mask, ref)
    (expected,) = torch.autograd.grad(whole, logprobs)
    total, count, numbers = 0.0, 0.0, mask.double()
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = [x[rows] for x in (logprobs, old, advantage, numbers, ref)]
        losses, *_ = token_losses(name, *part)
        reduction, lengths = REDUCTIONS[POLICY_LOSSES[name].reduction], numbers[rows].sum(-1)
        total = total + (losses * reduction.weights(numbers[rows], lengths[:, None], T)).sum()
        count = count + reduction.count(lengths)
    (found,) = torch.autograd.grad(total / count, logprobs)
    assert (total / count).item() == pytest.approx(whole.item(), abs=1e-12)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def test_the_weights_of_the_correction_are_not_those_of_the_divergence():
    """An answer that the correction leaves out is still kept close to the reference."""
    logprobs, old, ref, advantage, mask = batch(3)
    nothing = torch.zeros_like(logprobs)
    loss, metrics = policy_loss("ppo", logprobs, old, advantage, mask, ref, beta=0.5, weights=nothing)
    assert loss.item() == pytest.approx(0.5 * metrics["kl"].item(), abs=1e-12)


def test_gspo_pushes_all_tokens_of_an_answer_alike():
    """Inside the limits its gradient is that of s A (mean of the log-probabilities)."""
    logprobs, old, _, advantage, mask = batch(2)
    loss, _ = policy_loss("gspo", logprobs, old, advantage, mask, epsilon=0.99, epsilon_high=50.0)
    (found,) = torch.autograd.grad(loss, logprobs)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    means = ((logprobs - old) * mask).sum(-1, keepdim=True) / lengths
    surrogate = -(means.exp() * advantage[:, :1]).masked_select(mask.any(-1, keepdim=True)).mean()
    (expected,) = torch.autograd.grad(surrogate, logprobs)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def test_what_lies_outside_the_mask_has_no_influence():
    logprobs, old, ref, advantage, mask = batch()
    expected = policy_loss("cispo", logprobs, old, advantage, mask, ref)[0]
    spoiled = [torch.where(mask, x, fill) for x, fill in ((logprobs, -math.inf), (old, math.nan), (ref, math.inf))]
    found = policy_loss("cispo", spoiled[0], spoiled[1], advantage, mask, spoiled[2])[0]
    assert found.item() == expected.item()


def test_a_weight_of_a_correction_multiplies_the_loss_of_its_token():
    logprobs, old, _, advantage, mask = batch()
    weights = torch.arange(B * T, dtype=torch.float64).view(B, T)
    losses, *_ = token_losses("dapo", logprobs, old, advantage, mask.double())
    expected = (losses * weights)[mask].sum() / sum(LENGTHS)
    assert policy_loss("dapo", logprobs, old, advantage, mask, weights=weights)[0].item() == pytest.approx(
        expected.item(), abs=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("grp", {}), "'grp' is not a policy loss: choose one of ppo, grpo"),
        (("sapo", {"epsilon": 0.2}), r"sapo has no option epsilon, only tau_pos, tau_neg.*\(ppo, grpo, dr_grpo"),
        (("ppo", {"max_length": 9}), "ppo has no option max_length"),
        (("ppo", {"epsilon": -1.0}), "epsilon is -1.0: it must be a finite number, above 0"),
        (("ppo", {"dual_clip": 1.0}), "dual_clip is 1.0: it must be a finite number, above 1"),
        (("ppo", {"beta": -0.1}), "beta is -0.1: it must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    name, options = arguments
    logprobs, old, ref, advantage, mask = batch()
    with pytest.raises(ValueError, match=words):
        policy_loss(name, logprobs, old, advantage, mask, ref, **options)


def test_a_missing_reference_and_other_shapes_are_named():
    logprobs, old, _, advantage, mask = batch()
    with pytest.raises(ValueError, match=r"ref_logprobs is None, but beta is 0\.03"):
        policy_loss("grpo", logprobs, old, advantage, mask)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \[6, 6\]"):
        policy_loss("ppo", logprobs, old[:, 1:], advantage, mask)
    with pytest.raises(ValueError, match=r"advantages has shape \[6\]"):
        policy_loss("ppo", logprobs, old, advantage[:, 0], mask)


REWARDS = [1.0, 0.0, 0.5, 0.25] + [0.9] * 4 + [math.nan, 3.0, math.nan, 1.0] + [math.nan] * 3 + [7.0]


@pytest.mark.parametrize(
    ("name", "options", "first", "third"),
    [
        # mean 0.4375; squares of the distances: .31640625, .19140625, .00390625, .03515625; sum .546875
        ("grpo", {}, [x / (math.sqrt(0.546875 / 3) + 1e-6) for x in (0.5625, -0.4375, 0.0625, -0.1875)], None),
        ("grpo", {"ddof": 0, "eps": 0}, [x / math.sqrt(0.546875 / 4) for x in (0.5625, -0.4375, 0.0625, -0.1875)], 1.0),
        ("dr_grpo", {}, [0.5625, -0.4375, 0.0625, -0.1875], 1.0),
        ("rloo", {}, [1 - 0.25, 0 - 1.75 / 3, 0.5 - 1.25 / 3, 0.25 - 0.5], 2.0),
    ],
)
def test_advantages(name, options, first, third):
    found = advantages(name, torch.tensor(REWARDS, dtype=torch.float64), 4, **options).tolist()
    assert found[:4] == pytest.approx(first, abs=1e-9)
    assert found[4:8] == [0.0] * 4  # exactly, whatever the mean of four times 0.9 is rounded to
    third = math.sqrt(2) / (2 + math.sqrt(2) * 1e-6) if third is None else third
    assert found[8:12] == pytest.approx([0.0, third, 0.0, -third], abs=1e-9)  # of those two that have a reward
    assert found[12:] == [0.0] * 4  # one reward is no group
    assert advantages(name, torch.tensor(REWARDS), 4, **options).dtype == torch.float32


def test_bad_arguments_of_advantages_are_named():
    rewards = torch.zeros(6)
    for arguments, words in (
        (("mean", rewards, 2), "'mean' is no advantage: choose one of grpo, dr_grpo, rloo"),
        (("rloo", rewards, 4), r"rewards has shape \[6\].*group_size = 4"),
        (("rloo", rewards, 1), "group_size is 1: it must be an integer, at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            advantages(*arguments)
    with pytest.raises(ValueError, match="rloo has no option ddof, and needs none"):
        advantages("rloo", rewards, 2, ddof=1)
    with pytest.raises(ValueError, match="ddof is 2: it must be 0 or 1"):
        advantages("grpo", rewards, 2, ddof=2)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.5, 0.5)])
def test_gae_steps_over_what_the_policy_has_not_sampled(gamma, lam):
    drawn = random.Random(3)
    rows, length = 5, 13
    numbers = lambda: [[drawn.gauss(0, 1) for _ in range(length)] for _ in range(rows)]
    rewards, values = numbers(), numbers()
    mask = [[drawn.random() < share for _ in range(length)] for share in (1.0, 0.6, 0.3, 0.05, 0.0)]
    expected = [[0.0] * length for _ in range(rows)]
    for b in range(rows):
        value = advantage = 0.0
        for t in reversed(range(length)):
            if mask[b][t]:
                advantage = rewards[b][t] + gamma * value - values[b][t] + gamma * lam * advantage
                value, expected[b][t] = values[b][t], advantage
    tensor = lambda numbers: torch.tensor(numbers, dtype=torch.float64)
    found, returns = gae(tensor(rewards), tensor(values), torch.tensor(mask), gamma, lam)
    assert torch.allclose(found, tensor(expected), atol=1e-9, rtol=0)
    assert torch.allclose(returns, (tensor(expected) + tensor(values)) * tensor(mask), atol=1e-9, rtol=0)


def test_estimates_of_the_divergence():
    """On average over the policy, k1 and k3 are the divergence itself; far apart they stay finite."""
    policy, reference = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    true = (policy.exp() * (policy - reference)).sum().item()
    for name in ("k1", "k3"):
        assert (policy.exp() * kl_estimate(name, policy, reference)).sum().item() == pytest.approx(true, abs=1e-12)
    half_squares = [(p - q) ** 2 / 2 for p, q in zip(policy.tolist(), reference.tolist(), strict=True)]
    assert kl_estimate("k2", policy, reference).tolist() == pytest.approx(half_squares, abs=1e-12)
    assert kl_estimate("k3", torch.tensor([-900.0]), torch.tensor([0.0])).isfinite().all()
    with pytest.raises(ValueError, match="'k4' is no estimate"):
        kl_estimate("k4", policy, reference)


@pytest.mark.parametrize(
    ("name", "expected", "limited"),
    [
        ("off", [1, 1, 1, 1], 0),
        ("token_truncate", [0.4, 1.0, 2.0, 2.0], 2 / 4),
        ("token_mask", [0.0, 1.0, 4.0, 0.0], 2 / 4),
        ("sequence_truncate", [0.4, 0.4, 3.0, 3.0], 2 / 4),
        ("sequence_mask", [0.4, 0.4, 0.0, 0.0], 2 / 4),
    ],
)
def test_corrections(name, expected, limited):
    """Two answers of two tokens, with ratios 0.4 and 1, and 4 and 8; what lies outside the mask counts nowhere."""
    ratios = torch.tensor([[0.4, 1.0, 50.0], [4.0, 8.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    sampler = torch.full_like(ratios, -1.5)
    weights, metrics = correction(name, sampler + ratios.log(), sampler, mask)
    assert weights[:, :2].flatten().tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics["corrected_share"].item() == pytest.approx(limited)
    assert metrics["mismatch_max"].item() == pytest.approx(math.log(8), abs=1e-9)
    k3 = [ratio - 1 - math.log(ratio) for ratio in (0.4, 1.0, 4.0, 8.0)]  # of the sampler against the trainer
    assert metrics["mismatch_kl"].item() == pytest.approx(sum(k3) / 4, abs=1e-9)


def test_limits_of_a_correction():
    ratios = torch.tensor([[0.4, 1.0], [4.0, 8.0]], dtype=torch.float64)
    zeros = torch.zeros_like(ratios)
    weights, _ = correction("token_mask", ratios.log(), zeros, torch.ones_like(ratios), lowest=0.3, highest=4.5)
    assert weights.flatten().tolist() == pytest.approx([0.4, 1.0, 4.0, 0.0])
    with pytest.raises(ValueError, match="it must be 0 ≤ lowest < highest"):
        correction("token_mask", zeros, zeros, zeros, highest=0.2)
    with pytest.raises(ValueError, match="'token' is no correction: choose one of off, token_truncate"):
        correction("token", zeros, zeros, zeros)


def test_values_are_limited_around_the_old_ones_by_hand():
    """Six tokens in two answers, one of them filling: ½ max((V − R)², (V' − R)²), where |V' − V_old| ≤ 0.2."""
    from megavlm.align.losses import value_loss

    values = torch.tensor([[1.0, 0.5, -1.0], [0.3, 2.0, 9.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.9, 0.0, -0.5], [0.3, 1.0, 0.0]], dtype=torch.float64)
    returns = torch.tensor([[0.0, 1.0, -2.0], [1.3, 1.5, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # V':           1.0          0.2          -0.7          0.3          1.2
    each = [1.0, max(0.25, 0.64), max(1.0, 1.69), 1.0, max(0.25, 0.09)]
    loss, metrics = value_loss(values, old, returns, mask, clip=0.2)
    assert loss.item() == pytest.approx(sum(each) / 2 / 5, rel=1e-12)
    assert metrics["value_clip_share"].item() == pytest.approx(2 / 5)
    loss.backward()
    wanted = [[1.0 / 5, 0.0, 0.0], [-1.0 / 5, 0.5 / 5, 0.0]]  # (V − R) / 5, and none where V' is worse
    torch.testing.assert_close(values.grad, torch.tensor(wanted, dtype=torch.float64))
    plain, metrics = value_loss(values.detach(), old, returns, mask, clip=None)
    assert plain.item() == pytest.approx((1.0 + 0.25 + 1.0 + 1.0 + 0.25) / 2 / 5, rel=1e-12)
    assert metrics["value_clip_share"].item() == 0


@pytest.mark.parametrize("change", [{"returns": torch.zeros(2, 2)}, {"mask": torch.ones(3)}, {"clip": -1.0}])
def test_bad_arguments_of_a_value_loss_are_named(change):
    from megavlm.align.losses import value_loss

    good = dict.fromkeys(("values", "old_values", "returns", "mask"), torch.ones(2, 3))
    with pytest.raises(ValueError, match=next(iter(change))):
        value_loss(**{**good, **change})
