"""Losses of preference pairs: the chosen answer is to become likelier than the rejected one.

A loss is one function and one row of ``PREFERENCE_LOSSES``. The function gets its answers' log-probabilities in the
form that its row asks for, so it holds nothing but its formula.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # not softplus, which beyond 20 is cut to its asymptote: 2e-9 off

from megavlm.align.losses.arguments import check_numbers, mean, vectors

# Per pair: loss, implicit reward of the chosen answer, implicit reward of the rejected answer; [B] each.
Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of the table.

    Attributes:
        function: (chosen, rejected, **options) -> Result. What it gets of an answer, [B], is its summed
            log-probability, less the reference's and divided by its tokens if so asked. Its keyword-only parameters
            are the loss's options, with their defaults.
        reference: the reference's log-probability is subtracted; otherwise there must be none.
        per_token: means over the answer's target tokens instead of sums.
    """

    function: Callable[..., Result]
    reference: bool = False
    per_token: bool = False

    @property
    def options(self) -> dict[str, float | None]:
        """Options and their defaults; None where the default follows from another option."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """DPO (2305.18290): −(1−ε) log σ(βΔ) − ε log σ(−βΔ), where a share ε of the labels is taken to be wrong."""
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, beta * chosen, beta * rejected


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Result:
    """SLiC's hinge on DPO's margin (2305.10425, 2309.06657): max(0, 1 − βΔ)."""
    return torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Result:
    """IPO (2310.12036): (Δ̄ − 1/(2β))², with Δ̄ of per-token means; β is in the target alone."""
    return (chosen - rejected - 1 / (2 * beta)).square(), beta * chosen, beta * rejected


def robust(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Result:
    """Robust DPO (2403.00409): [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε).

    Its mean over labels flipped with probability ε is DPO's loss on the true ones. It falls below 0 as Δ grows.
    """
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return loss / (1 - 2 * label_smoothing), beta * chosen, beta * rejected


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float = 2.5, gamma: float | None = None) -> Result:
    """SimPO (2405.14734): −log σ(β(c̄ − j̄) − γ); γ is 0.55 β unless given."""
    gamma = 0.55 * beta if gamma is None else gamma
    return -logsigmoid(beta * (chosen - rejected) - gamma), beta * chosen, beta * rejected


def orpo(chosen: Tensor, rejected: Tensor, *, lam: float = 0.1) -> Result:
    """ORPO's penalty (2403.07691): −λ log σ(o_c − o_j), with log-odds o = x − log(1 − eˣ) of the per-token mean x.

    The whole loss adds the chosen answer's negative log-likelihood, which is the trainer's. An answer's reward is o.
    """
    odds_chosen, odds_rejected = chosen - _log1mexp(chosen), rejected - _log1mexp(rejected)
    return -lam * logsigmoid(odds_chosen - odds_rejected), odds_chosen, odds_rejected


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) of x ≤ 0, its absolute error within a few roundings; eˣ is a probability.

    x is held off 0 by the dtype's rounding: closer, a log-probability is nothing but the rounding of the log-sum-exp
    that it came from (which may even leave it above 0), while logarithm and gradient (1/x) grow beyond bounds.
    """
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, reference=True),
    "hinge": PreferenceLoss(hinge, reference=True),
    "ipo": PreferenceLoss(ipo, reference=True, per_token=True),
    "robust": PreferenceLoss(robust, reference=True),
    "simpo": PreferenceLoss(simpo, per_token=True),
    "orpo": PreferenceLoss(orpo, per_token=True),
}


def check_preference(name: str, options: Mapping[str, Any]) -> PreferenceLoss:
    """The loss of that name, if it takes these options; ``ValueError`` before any data if not."""
    loss = PREFERENCE_LOSSES.get(name)
    if loss is None:
        raise ValueError(f"{name!r} is no preference loss: choose one of {', '.join(PREFERENCE_LOSSES)}")
    for option in options:
        if option not in loss.options:
            takers = [other for other, row in PREFERENCE_LOSSES.items() if option in row.options]
            raise ValueError(
                f"{name} has no option {option}, only {', '.join(loss.options)}: leave it out"
                + (f", or choose a loss that has it ({', '.join(takers)})" if takers else "")
            )
    check_numbers(**options)
    return loss


def preference_loss(
    name: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    **options: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [B] of B pairs, and metrics.

    With Δ = (chosen − ref_chosen) − (rejected − ref_rejected), and a bar for means per target token:

    ======= ==================================================== ============================
    name    loss                                                 options
    ======= ==================================================== ============================
    sigmoid −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                      beta 0.1, label_smoothing 0
    hinge   max(0, 1 − βΔ)                                       beta 0.1
    ipo     (Δ̄ − 1/(2β))²                                        beta 0.1
    robust  [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)           beta 0.1, label_smoothing 0.1
    simpo   −log σ(β(c̄ − j̄) − γ)                                 beta 2.5, gamma 0.55 β
    orpo    −λ log σ(log-odds(c̄) − log-odds(j̄)), penalty alone   lam 0.1
    ======= ==================================================== ============================

    Args:
        name: a key of ``PREFERENCE_LOSSES``, whose functions name their sources.
        chosen, rejected: floating [B], log-probabilities summed over an answer's target tokens, under the policy.
        ref_chosen, ref_rejected: the same under the reference, constants for the gradient; None for simpo and orpo,
            which have none.
        chosen_lengths, rejected_lengths: [B], target tokens of each answer, at least 1; read by ipo, simpo and orpo,
            and may be None for the others. On an accelerator they are not looked at, since the host would have to
            wait: a 0 there makes the pair's loss infinite or NaN.
        options: those of the table.

    Returns:
        Losses [B], float64 if ``chosen`` is, else float32, and means over the pairs without gradient:
        ``rewards/chosen`` and ``rewards/rejected``, the implicit rewards: β times what the loss compares (so of
        per-token means for ipo, and without reference for simpo), for orpo the log-odds; ``margin``, their
        difference; ``accuracy``, the share of pairs where it is above 0.

    Raises:
        ValueError: an unknown name; an option that the loss does not have, or out of range; a reference too many or
            missing; shapes that differ.
    """
    loss = check_preference(name, options)
    chosen, rejected = vectors(chosen=chosen, rejected=rejected)
    references = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    for argument, reference in references.items():
        if loss.reference and reference is None:
            raise ValueError(f"{argument} is None: {name} compares with a reference's summed log-probabilities")
        if not loss.reference and reference is not None:
            raise ValueError(f"{argument} is given, but {name} has no reference and would ignore it: pass None")
    if loss.reference:
        # a constant, also where it comes out of the same weights with their adapter off
        _, ref_chosen, ref_rejected = vectors(chosen=chosen, **references)
        chosen, rejected = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    if loss.per_token:
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        _, *lengths_of = vectors(chosen=chosen, **lengths)
        for argument, tokens in zip(lengths, lengths_of, strict=True):
            if tokens.device.type == "cpu" and (tokens < 1).any():
                raise ValueError(f"{argument} has {tokens.min().item():g}: {name} divides by it, so at least 1")
        chosen, rejected = chosen / lengths_of[0], rejected / lengths_of[1]
    losses, reward_chosen, reward_rejected = loss.function(chosen, rejected, **options)
    return losses, {
        "rewards/chosen": mean(reward_chosen),
        "rewards/rejected": mean(reward_rejected),
        "accuracy": mean((reward_chosen > reward_rejected).to(losses.dtype)),
        "margin": mean(reward_chosen - reward_rejected),
    }
