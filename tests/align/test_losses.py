"""Losses of alignment: values by hand in plain Python, gradients by finite differences, limits and refusals.

Hand-made values agree to 1e-9 in float64: they are about 1, the dtype rounds at 2e-16, and the formulas written naively
with `math` lose a few digits by themselves.
"""

import inspect
import math
import re

import pytest
import torch

from megavlm.align.losses import PREFERENCE_LOSSES, PreferenceLoss, kto_loss, preference_loss, reward_loss
from megavlm.config.align_sections import AlignSettings

EXACT = dict(rel=1e-9, abs=1e-9)

# chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths
CASES = [
    (-11.0, -14.5, -12.25, -13.0, 7, 5),  # already preferred
    (-31.0, -20.0, -25.0, -22.0, 12, 9),  # the wrong way round
    (-0.9, -48.0, -17.0, -1.5, 3, 40),  # short against long
    (-8.0, -8.0, -8.0, -8.0, 4, 4),  # nothing learnt
]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def delta(c, j, rc, rj, nc, nj):
    return (c - rc) - (j - rj)


def by_sums(beta):
    """Implicit rewards β (lp − ref)."""
    return lambda c, j, rc, rj, nc, nj: (beta * (c - rc), beta * (j - rj))


def log_odds(x):
    return math.log(math.exp(x) / (1 - math.exp(x)))


def smoothed(beta, eps):
    def value(*case):
        x = beta * delta(*case)
        return -(1 - eps) * math.log(sigma(x)) - eps * math.log(sigma(-x))

    return value


def robust_by_hand(beta, eps):
    def value(*case):
        x = beta * delta(*case)
        return (-(1 - eps) * math.log(sigma(x)) + eps * math.log(sigma(-x))) / (1 - 2 * eps)

    return value


def ipo_by_hand(beta):
    return lambda c, j, rc, rj, nc, nj: ((c - rc) / nc - (j - rj) / nj - 1 / (2 * beta)) ** 2


def normed(beta, smoothing):
    def value(c, j, rc, rj, nc, nj):
        margin = beta * ((c - rc) / nc - (j - rj) / nj)
        return -(1 - smoothing) * math.log(sigma(margin)) - smoothing * math.log(sigma(-margin))

    return value


def simpo_by_hand(beta, gamma):
    return lambda c, j, rc, rj, nc, nj: -math.log(sigma(beta * (c / nc - j / nj) - gamma))


def orpo_by_hand(lam):
    return lambda c, j, rc, rj, nc, nj: -lam * math.log(sigma(log_odds(c / nc) - log_odds(j / nj)))


def simpo_rewards(beta):
    return lambda c, j, rc, rj, nc, nj: (beta * c / nc, beta * j / nj)


def ipo_rewards(beta):
    return lambda c, j, rc, rj, nc, nj: (beta * (c - rc) / nc, beta * (j - rj) / nj)


def orpo_rewards(c, j, rc, rj, nc, nj):
    return log_odds(c / nc), log_odds(j / nj)


# name, options, loss and rewards of one pair. Without options, the defaults of METHODS.md are those written here.
PREFERENCE = [
    ("sigmoid", {}, smoothed(0.1, 0.0), by_sums(0.1)),
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}, smoothed(0.3, 0.2), by_sums(0.3)),
    ("sigmoid_norm", {}, normed(5.0, 0.0), ipo_rewards(5.0)),
    ("sigmoid_norm", {"beta": 2.0, "label_smoothing": 0.2}, normed(2.0, 0.2), ipo_rewards(2.0)),
    ("hinge", {}, lambda *case: max(0.0, 1 - 0.1 * delta(*case)), by_sums(0.1)),
    ("hinge", {"beta": 0.5}, lambda *case: max(0.0, 1 - 0.5 * delta(*case)), by_sums(0.5)),
    ("ipo", {}, ipo_by_hand(0.1), ipo_rewards(0.1)),
    ("ipo", {"beta": 0.4}, ipo_by_hand(0.4), ipo_rewards(0.4)),
    ("robust", {}, robust_by_hand(0.1, 0.1), by_sums(0.1)),
    ("robust", {"beta": 0.2, "label_smoothing": 0.3}, robust_by_hand(0.2, 0.3), by_sums(0.2)),
    ("simpo", {}, simpo_by_hand(2.5, 1.375), simpo_rewards(2.5)),
    ("simpo", {"beta": 2.0}, simpo_by_hand(2.0, 1.1), simpo_rewards(2.0)),
    ("simpo", {"beta": 2.0, "gamma": 0.0}, simpo_by_hand(2.0, 0.0), simpo_rewards(2.0)),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, simpo_by_hand(2.0, 1.0), simpo_rewards(2.0)),
    ("orpo", {}, orpo_by_hand(0.1), orpo_rewards),
    ("orpo", {"lam": 0.7}, orpo_by_hand(0.7), orpo_rewards),
]
ROWS = pytest.mark.parametrize(
    ("name", "options", "value", "rewards"), PREFERENCE, ids=[f"{row[0]}-{row[1]}" for row in PREFERENCE]
)
NAMES = pytest.mark.parametrize("name", PREFERENCE_LOSSES)


def tensors(name, cases, dtype=torch.float64):
    """The six tensors of these cases, without reference where the loss has none."""
    *logps, chosen_lengths, rejected_lengths = zip(*cases, strict=True)
    chosen, rejected, *references = (torch.tensor(x, dtype=dtype) for x in logps)
    if not PREFERENCE_LOSSES[name].reference:
        references = [None, None]
    return chosen, rejected, *references, torch.tensor(chosen_lengths), torch.tensor(rejected_lengths)


def swapped(name, place, value, cases=CASES):
    """The six arguments, one of them another."""
    arguments = list(tensors(name, cases))
    arguments[place] = value
    return arguments


def test_signatures_are_those_of_the_contract():
    parameters = {f: list(inspect.signature(f).parameters) for f in (preference_loss, kto_loss, reward_loss)}
    assert parameters == {
        preference_loss: [
            *("name", "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths"),
            "options",
        ],
        kto_loss: ["logps", "ref_logps", "desirable", "z0", "beta", "desirable_weight", "undesirable_weight"],
        reward_loss: ["chosen_scores", "rejected_scores", "margin", "centering"],
    }


def test_every_loss_and_option_has_values_by_hand():
    assert list(PREFERENCE_LOSSES) == ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "simpo", "orpo"]
    for name, loss in PREFERENCE_LOSSES.items():
        tried = [set(options) for known, options, *_ in PREFERENCE if known == name]
        assert set() in tried, f"{name} with its defaults"
        assert set().union(*tried) == set(loss.options), name
        assert name in preference_loss.__doc__
        assert loss.function.__doc__


@ROWS
def test_preference_values(name, options, value, rewards):
    losses, metrics = preference_loss(name, *tensors(name, CASES), **options)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([value(*case) for case in CASES], **EXACT)
    chosen, rejected = zip(*(rewards(*case) for case in CASES), strict=True)
    assert {key: metric.item() for key, metric in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": sum(chosen) / len(CASES),
            "rewards/rejected": sum(rejected) / len(CASES),
            "margin": (sum(chosen) - sum(rejected)) / len(CASES),
            "accuracy": sum(c > j for c, j in zip(chosen, rejected, strict=True)) / len(CASES),
        },
        **EXACT,
    )
    assert metrics["accuracy"] == 0.5, "two cases are right, one is wrong, and one is a tie"


@ROWS
def test_preference_gradients(name, options, value, rewards):
    chosen, rejected, *others = tensors(name, CASES)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    # of a loss about 1e2 at most, by differences of 1e-6: 1e-6 absolute is what they can resolve
    assert torch.autograd.gradcheck(
        lambda c, j: preference_loss(name, c, j, *others, **options)[0], inputs, eps=1e-6, atol=1e-6, rtol=1e-5
    )
    losses, metrics = preference_loss(name, *inputs, *others, **options)
    assert losses.requires_grad
    assert not any(metric.requires_grad or metric.ndim for metric in metrics.values())


@NAMES
def test_a_reference_is_a_constant(name):
    arguments = tensors(name, CASES)
    for x in arguments[:4]:
        if x is not None:
            x.requires_grad_()
    preference_loss(name, *arguments)[0].sum().backward()
    assert arguments[0].grad.abs().sum() > 0
    assert all(x is None or x.grad is None for x in arguments[2:4])


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preference_limits(name, dtype):
    """Far apart either way, equal, and certain answers: numbers, and gradients that are numbers."""
    far = [-1e5, -1e3, -700.0, -89.0, -20.0, -1e-3, -1e-9, -1e-18, 0.0, 1e-7]
    cases = [(c, j, -10.0, -10.0, n, n) for c in far for j in far for n in (1, 1000)]
    chosen, rejected, *others = tensors(name, cases, dtype)
    losses, metrics = preference_loss(name, chosen.requires_grad_(), rejected.requires_grad_(), *others)
    losses.sum().backward()
    assert losses.dtype == dtype
    for x in (losses, chosen.grad, rejected.grad, *metrics.values()):
        assert x.isfinite().all()
    if name != "ipo":  # whose margin has a target and may be too large; all others only ever want it larger
        assert (chosen.grad <= 0).all()
        assert (rejected.grad >= 0).all()


@NAMES
def test_equal_answers_have_no_margin(name):
    _, metrics = preference_loss(name, *tensors(name, [(-8.0, -8.0, -3.0, -3.0, 4, 4)]))
    assert metrics["margin"] == metrics["accuracy"] == 0


EQUAL = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,  # (1 / 0.2)²
    "robust": math.log(2),  # (0.9 − 0.1) / 0.8 = 1
    "simpo": math.log(1 + math.exp(1.375)),
    "orpo": 0.1 * math.log(2),
}


@pytest.mark.parametrize(("name", "expected"), EQUAL.items())
def test_equal_answers_cost_what_the_formula_says(name, expected):
    losses, _ = preference_loss(name, *tensors(name, [(-8.0, -8.0, -3.0, -3.0, 4, 4)]))
    assert losses.item() == pytest.approx(expected, **EXACT)


def test_the_setting_names_every_loss():
    assert set(re.findall(r"\w+", AlignSettings.model_fields["loss"].description)) >= set(PREFERENCE_LOSSES)
    options = {option for loss in PREFERENCE_LOSSES.values() for option in loss.options}
    assert set(AlignSettings.model_fields) >= options  # each has a setting of its name


def test_far_limits():
    """log σ keeps its digits where σ rounds to 1, and its slope where σ rounds to 0."""
    far = [(-10.0, -410.0, 0.0, 0.0, 1, 1), (-410.0, -10.0, 0.0, 0.0, 1, 1), (-220.0, -10.0, 0.0, 0.0, 1, 1)]
    expected = [math.exp(-40), 40.0, 21 + math.exp(-21)]  # the last is what softplus cuts off
    losses, _ = preference_loss("sigmoid", *tensors("sigmoid", far))
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    losses, _ = preference_loss("simpo", *tensors("simpo", far), gamma=0.0, beta=0.1)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("mean", [-1e-12, -1e-8, -1e-4, -0.1, -math.log(2), -5.0, -40.0, -800.0])
def test_orpo_log_odds_keep_their_digits(mean):
    """Against log(1 − p) of p = eˣ by `math`, which is exact there: log(−expm1(x)), or −eˣ where that rounds to 0."""
    expected = mean - (math.log(-math.expm1(mean)) or -math.exp(mean))
    _, metrics = preference_loss("orpo", *tensors("orpo", [(3 * mean, -6.0, 0, 0, 3, 3)]))
    assert metrics["rewards/chosen"].item() == pytest.approx(expected, rel=1e-13)
    if mean < -1e-5:  # in float32 the mean itself is off by 6e-8 of it, and log-odds by as much of 1
        _, metrics = preference_loss("orpo", *tensors("orpo", [(3 * mean, -6.0, 0, 0, 3, 3)], torch.float32))
        assert metrics["rewards/chosen"].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_no_length_no_effect_on_sums_and_much_on_means():
    for name, loss in PREFERENCE_LOSSES.items():
        *logps, chosen_lengths, rejected_lengths = tensors(name, CASES)
        there, _ = preference_loss(name, *logps, chosen_lengths, rejected_lengths)
        longer, _ = preference_loss(name, *logps, chosen_lengths * 2, rejected_lengths)
        assert torch.equal(there, longer) != loss.per_token
        if not loss.per_token:
            assert torch.equal(there, preference_loss(name, *logps, None, None)[0])


@NAMES
def test_a_pair_does_not_depend_on_its_neighbours(name):
    together, _ = preference_loss(name, *tensors(name, CASES))
    alone = [preference_loss(name, *tensors(name, [case]))[0].item() for case in CASES]
    assert together.tolist() == pytest.approx(alone, rel=1e-15)  # vectorised logarithms may round the last bit apart


@NAMES
def test_metrics_of_parts_make_those_of_the_whole(name):
    _, whole = preference_loss(name, *tensors(name, CASES))
    parts = [(part, preference_loss(name, *tensors(name, part))[1]) for part in (CASES[:1], CASES[1:])]
    nothing, metrics = preference_loss(name, *(x if x is None else x[:0] for x in tensors(name, CASES)))
    assert nothing.shape == (0,)
    parts.append(([], metrics))  # a rank without pairs
    for key, value in whole.items():
        weighted = sum(len(part) * metrics[key].item() for part, metrics in parts)
        assert weighted / len(CASES) == pytest.approx(value.item(), **EXACT)


@NAMES
def test_half_precision_is_computed_in_float32(name):
    chosen, rejected, *others = tensors(name, CASES)
    losses, _ = preference_loss(name, chosen.bfloat16(), rejected.bfloat16(), *others)
    widened, _ = preference_loss(name, chosen.bfloat16().float(), rejected.bfloat16().float(), *others)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, widened)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {}, "'dpo' is not a preference loss: choose one of " + ", ".join(PREFERENCE_LOSSES)),
        (
            "hinge",
            {"label_smoothing": 0.1},
            r"hinge has no option label_smoothing, only beta.*\(sigmoid, sigmoid_norm, robust\)",
        ),
        ("sigmoid", {"gamma": 0.1}, r"sigmoid has no option gamma, only beta, label_smoothing.*\(simpo\)"),
        ("ipo", {"lam": 0.1}, r"ipo has no option lam, only beta.*\(orpo\)"),
        ("orpo", {"beta": 0.1}, "orpo has no option beta, only lam"),
        ("simpo", {"label_smoothing": 0.0}, "simpo has no option label_smoothing"),
        ("robust", {"betta": 0.1}, "robust has no option betta, only beta, label_smoothing: remove the option$"),
        ("sigmoid", {"beta": 0.0}, "beta is 0.0: .* above 0"),
        ("ipo", {"beta": -1.0}, "beta is -1.0"),
        ("ipo", {"beta": "1e-1"}, "beta is '1e-1': it must be a finite number"),
        ("hinge", {"beta": True}, "beta is True"),
        ("hinge", {"beta": math.inf}, "beta is inf"),
        ("hinge", {"beta": None}, "beta is None"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing is 0.5: .* below 0.5"),
        ("sigmoid", {"label_smoothing": -0.1}, "label_smoothing is -0.1: .* at least 0"),
        ("simpo", {"gamma": -0.1}, "gamma is -0.1: .* at least 0"),
        ("orpo", {"lam": math.nan}, "lam is nan"),
    ],
)
def test_preference_refuses_options(name, options, message):
    arguments = tensors(name if name in PREFERENCE_LOSSES else "sigmoid", CASES)
    with pytest.raises(ValueError, match=message):
        preference_loss(name, *arguments, **options)


@NAMES
def test_preference_refuses_a_reference_too_many_or_missing(name):
    has = PREFERENCE_LOSSES[name].reference
    for place, argument in ((2, "ref_chosen"), (3, "ref_rejected")):
        other = None if has else torch.zeros(len(CASES))
        with pytest.raises(ValueError, match=f"{argument} is {'None' if has else 'given'}.*{name}"):
            preference_loss(name, *swapped(name, place, other))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(4, 1), r"chosen has shape \[4, 1\]"),
        (0, torch.tensor(1.0), r"chosen has shape \[\]"),
        (0, torch.zeros(4, dtype=torch.long), "chosen has dtype torch.int64"),
        (1, torch.zeros(3), r"rejected has shape \[3\].*\[4\]"),
        (1, [0.0] * 4, "rejected is .* must be a tensor"),
        (2, torch.zeros(1), r"ref_chosen has shape \[1\]"),  # would broadcast
        (3, torch.zeros(4, 4), r"ref_rejected has shape \[4, 4\]"),
        (4, torch.tensor(3), r"chosen_lengths has shape \[\]"),
        (4, torch.tensor([3, 0, 1, 1]), "chosen_lengths contains 0: .* ipo divides by it"),
        (5, torch.tensor([3, 1, -2, 1]), "rejected_lengths contains -2"),
        (5, None, "rejected_lengths is None"),
    ],
)
def test_preference_refuses_tensors(place, value, message):
    with pytest.raises(ValueError, match=message):
        preference_loss("ipo", *swapped("ipo", place, value))


def test_a_loss_is_added_by_one_function_and_one_line(monkeypatch):
    """The example of docs/adding.md."""

    def squared(chosen, rejected, *, beta=0.1):
        return (beta * (chosen - rejected) - 1).square(), beta * chosen, beta * rejected

    monkeypatch.setitem(PREFERENCE_LOSSES, "squared", PreferenceLoss(squared, reference=True))
    losses, metrics = preference_loss("squared", *tensors("squared", CASES), beta=0.5)
    assert losses.tolist() == pytest.approx([(0.5 * delta(*case) - 1) ** 2 for case in CASES], **EXACT)
    assert metrics["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"lam, only beta"):
        preference_loss("squared", *tensors("squared", CASES), lam=0.1)


# KTO: logps, ref_logps, desirable
ANSWERS = [(-12.0, -15.0, True), (-30.0, -22.0, True), (-9.0, -14.0, False), (-40.0, -21.0, False), (-5.0, -5.0, True)]
KTO = [(0.0, 0.1, 1.0, 1.0), (1.7, 0.1, 1.0, 1.0), (4.0, 0.25, 1.3, 0.6)]


def answers(cases=ANSWERS, dtype=torch.float64):
    logps, ref_logps, desirable = zip(*cases, strict=True)
    return torch.tensor(logps, dtype=dtype), torch.tensor(ref_logps, dtype=dtype), torch.tensor(desirable)


def kto_by_hand(logp, ref, desirable, z0, beta, good, bad):
    if desirable:
        return good * (1 - sigma(beta * (logp - ref - z0)))
    return bad * (1 - sigma(beta * (z0 - (logp - ref))))


@pytest.mark.parametrize("options", KTO)
@pytest.mark.parametrize("form", [float, lambda z0: torch.tensor(z0, dtype=torch.float64)], ids=["number", "tensor"])
def test_kto_values(options, form):
    z0, beta, *weights = options
    losses, metrics = kto_loss(*answers(), form(z0), beta, *weights)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([kto_by_hand(*answer, *options) for answer in ANSWERS], **EXACT)
    assert {key: metric.item() for key, metric in metrics.items()} == pytest.approx(
        {
            "rewards/desirable": beta * (3 - 8 + 0) / 3,
            "rewards/undesirable": beta * (5 - 19) / 2,
            "count/desirable": 3,
            "count/undesirable": 2,
            # r − z0 of the answers: 3 and −8 (desirable), 5 and −19 (not), 0 (desirable), less z0
            "accuracy": {0.0: 2, 1.7: 2, 4.0: 1}[z0] / 5,
            "z0": z0,
        },
        **EXACT,
    )


@pytest.mark.parametrize("options", KTO)
def test_kto_gradients(options):
    logps, ref_logps, desirable = answers()
    logps.requires_grad_()
    # of losses about 1, by differences of 1e-6
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(x, ref_logps, desirable, *options)[0], (logps,), eps=1e-6, atol=1e-8
    )
    z0 = torch.tensor(options[0], dtype=torch.float64, requires_grad=True)
    losses, metrics = kto_loss(logps, ref_logps.requires_grad_(), desirable, z0, *options[1:])
    losses.sum().backward()
    assert z0.grad is None
    assert ref_logps.grad is None
    assert not any(metric.requires_grad or metric.ndim for metric in metrics.values())
    assert torch.equal(logps.grad < 0, desirable), "likelier when desirable, else less likely"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kto_limits(dtype):
    far = [(x, -10.0, good) for x in (-1e5, -710.0, -10.0, 0.0) for good in (True, False)] + [(0.0, -1e5, True)]
    logps, ref_logps, desirable = answers(far, dtype)
    losses, _ = kto_loss(logps.requires_grad_(), ref_logps, desirable, 0.0, 0.1, 1.2, 0.7)
    losses.sum().backward()
    assert losses.dtype == dtype
    assert logps.grad.isfinite().all()
    weights = [1.2, 0.7]
    for value, (x, _, good) in zip(losses.tolist()[:6], far, strict=False):
        weight = weights[not good]
        expected = weight / 2 if x == -10 else weight * good
        assert value == pytest.approx(expected, abs=1e-7)  # 710 tokens' worth below: e^-70, nothing in either dtype
    assert losses[-1] == 0


def test_kto_keeps_the_digits_of_small_losses():
    """1 − σ(x) is 0 in float32 from x = 17 on; σ(−x) is not."""
    losses, _ = kto_loss(*answers([(-10.0, -410.0, True)], torch.float32), 0.0, 0.1, 1.0, 1.0)
    assert losses.item() == pytest.approx(math.exp(-40), rel=1e-5, abs=0)


def test_kto_answers_do_not_depend_on_their_neighbours():
    together, _ = kto_loss(*answers(), 1.7, 0.1, 1.3, 0.6)
    alone = [kto_loss(*answers([answer]), 1.7, 0.1, 1.3, 0.6) for answer in ANSWERS]
    assert together.tolist() == pytest.approx([losses.item() for losses, _ in alone], rel=1e-15)
    assert alone[0][1]["rewards/undesirable"] == 0, "none of that kind"
    nothing, metrics = kto_loss(*(x[:0] for x in answers()), 1.7, 0.1, 1.3, 0.6)
    assert nothing.shape == (0,)
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight is nan"),
        ({"desirable": torch.tensor([1, -1, 1, -1, 1])}, "desirable must be a bool tensor .* torch.int64"),
        ({"desirable": [True] * 5}, "desirable must be a bool tensor"),
        ({"desirable": torch.tensor([True])}, r"desirable has shape \[1\]"),
        ({"ref_logps": torch.zeros(4)}, r"ref_logps has shape \[4\]"),
        ({"logps": torch.zeros(5, 1)}, r"logps has shape \[5, 1\]"),
        ({"z0": torch.zeros(5)}, r"z0 has shape \[5\]: it must be one number"),
    ],
)
def test_kto_refuses(change, message):
    arguments = dict(zip(("logps", "ref_logps", "desirable"), answers(), strict=True))
    arguments |= dict(z0=0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    with pytest.raises(ValueError, match=message):
        kto_loss(**(arguments | change))


# Reward model: chosen and rejected scores, and margins of the pairs
SCORES = [(1.2, -0.4, 0.5), (-2.0, 1.5, 0.0), (0.3, 0.3, 1.0), (3.0, 2.5, 0.25)]


def scores(cases=SCORES, dtype=torch.float64):
    return [torch.tensor(x, dtype=dtype) for x in zip(*cases, strict=True)]


@pytest.mark.parametrize("centering", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margin", [0.0, 1, 0.7, torch.tensor(0.7, dtype=torch.float64), None])
def test_reward_values(margin, centering):
    """None: each pair's own margin."""
    chosen, rejected, own = scores()
    losses, metrics = reward_loss(chosen, rejected, own if margin is None else margin, centering)
    assert losses.dtype == torch.float64
    expected = [
        -math.log(sigma(c - j - (m if margin is None else float(margin)))) + centering * (c + j) ** 2
        for c, j, m in SCORES
    ]
    assert losses.tolist() == pytest.approx(expected, **EXACT)
    every = [1.2, -0.4, -2.0, 1.5, 0.3, 0.3, 3.0, 2.5]
    middle = sum(every) / 8
    assert {key: metric.item() for key, metric in metrics.items()} == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": (1.6 - 3.5 + 0.0 + 0.5) / 4,
            "scores/mean": middle,
            "scores/std": math.sqrt(sum((s - middle) ** 2 for s in every) / 8),
        },
        **EXACT,
    )


def test_reward_gradients():
    chosen, rejected, margin = scores()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    # of losses about 1, by differences of 1e-6
    assert torch.autograd.gradcheck(lambda c, j: reward_loss(c, j, margin, 0.1)[0], inputs, eps=1e-6, atol=1e-8)
    _, metrics = reward_loss(*inputs, margin, 0.1)
    assert not any(metric.requires_grad or metric.ndim for metric in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_limits(dtype):
    far = [(1e4, -1e4, 0.0), (-1e4, 1e4, 0.0), (50.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1e4, 1e4, 0.0)]
    chosen, rejected, margin = scores(far, dtype)
    losses, metrics = reward_loss(chosen.requires_grad_(), rejected.requires_grad_(), margin, 0.0)
    losses.sum().backward()
    assert losses.dtype == dtype
    assert losses.tolist() == pytest.approx([0.0, 2e4, math.exp(-50), math.log(2), math.log(2)], rel=1e-6, abs=0)
    assert chosen.grad.tolist() == pytest.approx([0.0, -1.0, -math.exp(-50), -0.5, -0.5], rel=1e-5, abs=0)
    assert all(metric.isfinite() for metric in metrics.values())


def test_reward_pairs_do_not_depend_on_their_neighbours():
    chosen, rejected, margin = scores()
    together, _ = reward_loss(chosen, rejected, margin, 0.01)
    alone = [reward_loss(chosen[i : i + 1], rejected[i : i + 1], margin[i : i + 1], 0.01)[0].item() for i in range(4)]
    assert together.tolist() == pytest.approx(alone, rel=1e-15)
    nothing, metrics = reward_loss(chosen[:0], rejected[:0], 0.0, 0.01)
    assert nothing.shape == (0,)
    assert all(metric == 0 for metric in metrics.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.zeros(3), 0.0, 0.0), r"rejected_scores has shape \[3\]"),
        ((torch.zeros(2, 1), torch.zeros(2, 1), 0.0, 0.0), r"chosen_scores has shape \[2, 1\]"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(1), 0.0), r"margin has shape \[1\]"),
        ((torch.zeros(2), torch.zeros(2), None, 0.0), "margin is None"),
        ((torch.zeros(2), torch.zeros(2), math.nan, 0.0), "margin is nan"),
        ((torch.zeros(2), torch.zeros(2), 0.0, -0.1), "centering is -0.1: .* at least 0"),
    ],
)
def test_reward_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        reward_loss(*arguments)
