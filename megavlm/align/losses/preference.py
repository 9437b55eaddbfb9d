"""Losses of preference pairs, which make the chosen answer likelier than the rejected one.

A loss is a function and an entry of ``PREFERENCE_LOSSES``. The function gets the log-probabilities of the answers in
the form that its entry requires, so it contains only the formula.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # softplus would be wrong by 2e-9 beyond 20, where it uses its asymptote

from megavlm.align.losses.arguments import entry_of, mean, vectors

# The loss, the implicit reward of the chosen answer and that of the rejected answer for each pair; [B] each.
Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PreferenceLoss:
    """An entry of ``PREFERENCE_LOSSES``.

    Attributes:
        function: (chosen, rejected, **options) -> Result. Its arguments for an answer, [B], are the summed
            log-probability, minus that of the reference model and divided by the number of target tokens if the entry
            requires it. Its keyword-only parameters are the options of the loss with their defaults.
        reference: whether the reference model's log-probability is subtracted; otherwise there must be none.
        per_token: whether to use means over the answer's target tokens instead of sums.
    """

    function: Callable[..., Result]
    reference: bool = False
    per_token: bool = False

    @property
    def options(self) -> dict[str, float | None]:
        """The options and their defaults; None if the default depends on another option."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """DPO (2305.18290): −(1−ε) log σ(βΔ) − ε log σ(−βΔ), which assumes that a fraction ε of the labels is wrong."""
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, beta * chosen, beta * rejected


def sigmoid_norm(chosen: Tensor, rejected: Tensor, *, beta: float = 5.0, label_smoothing: float = 0.0) -> Result:
    """Length-normalised DPO (2411.15124, section 5): the loss of DPO on per-token means, so that length has no weight.

    The means are smaller than the sums by the number of tokens, and β is larger accordingly.
    """
    return sigmoid(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Result:
    """The hinge loss of SLiC on the margin of DPO (2305.10425, 2309.06657): max(0, 1 − βΔ)."""
    return torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Result:
    """IPO (2310.12036): (Δ̄ − 1/(2β))², with Δ̄ from per-token means; β occurs only in the target."""
    return (chosen - rejected - 1 / (2 * beta)).square(), beta * chosen, beta * rejected


def robust(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Result:
    """Robust DPO (2403.00409): [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε).

    If labels are flipped with probability ε, its expectation is the DPO loss of the true labels. It is negative for
    large Δ.
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

    The complete loss also has the negative log-likelihood of the chosen answer, which the caller adds. The reward of an
    answer is o.
    """
    odds_chosen, odds_rejected = chosen - _log1mexp(chosen), rejected - _log1mexp(rejected)
    return -lam * logsigmoid(odds_chosen - odds_rejected), odds_chosen, odds_rejected


def _log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 − eˣ) for x ≤ 0, where eˣ is a probability, with an absolute error of a few roundings.

    x is kept away from 0 by the rounding error of the dtype. Closer to 0, a log-probability is only the rounding error
    of the log-sum-exp that it was computed from (it may even be above 0), while the logarithm and the gradient (1/x)
    are unbounded.
    """
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, reference=True),
    "sigmoid_norm": PreferenceLoss(sigmoid_norm, reference=True, per_token=True),
    "hinge": PreferenceLoss(hinge, reference=True),
    "ipo": PreferenceLoss(ipo, reference=True, per_token=True),
    "robust": PreferenceLoss(robust, reference=True),
    "simpo": PreferenceLoss(simpo, per_token=True),
    "orpo": PreferenceLoss(orpo, per_token=True),
}


def check_preference(name: str, options: Mapping[str, Any]) -> PreferenceLoss:
    """Returns the loss with this name. Raises ValueError if there is none, or if it does not accept the options."""
    return entry_of(PREFERENCE_LOSSES, "preference", name, options)


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
    """Computes the losses [B] of B pairs, and metrics.

    Δ = (chosen − ref_chosen) − (rejected − ref_rejected), and a bar denotes means over target tokens:

    ============ ==================================================== ============================
    name         loss                                                 options
    ============ ==================================================== ============================
    sigmoid      −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                      beta 0.1, label_smoothing 0
    sigmoid_norm −(1−ε) log σ(βΔ̄) − ε log σ(−βΔ̄)                      beta 5, label_smoothing 0
    hinge        max(0, 1 − βΔ)                                       beta 0.1
    ipo          (Δ̄ − 1/(2β))²                                        beta 0.1
    robust       [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)           beta 0.1, label_smoothing 0.1
    simpo        −log σ(β(c̄ − j̄) − γ)                                 beta 2.5, gamma 0.55 β
    orpo         −λ log σ(log-odds(c̄) − log-odds(j̄)), penalty alone   lam 0.1
    ============ ==================================================== ============================

    Args:
        name: a key of ``PREFERENCE_LOSSES``; the functions cite the papers.
        chosen, rejected: floating [B], log-probabilities summed over an answer's target tokens, under the policy.
        ref_chosen, ref_rejected: the same under the reference model; no gradient flows to them. None for simpo and
            orpo, which have no reference model.
        chosen_lengths, rejected_lengths: [B], number of target tokens of each answer, at least 1. Only ipo,
            sigmoid_norm, simpo and orpo read them; they may be None for the other losses. On an accelerator their
            values are not checked, because the host would have to wait; a 0 makes the loss of the pair infinite or NaN.
        options: the options in the table.

    Returns:
        Losses [B], float64 if ``chosen`` is, otherwise float32; and means over the pairs without gradient:
        ``rewards/chosen`` and ``rewards/rejected``, the implicit rewards, which are β times what the loss compares (so
        they are per-token means for ipo, and without reference for simpo), or the log-odds for orpo; ``margin``, the
        difference of the rewards; ``accuracy``, the fraction of pairs in which it is above 0.

    Raises:
        ValueError: the name is unknown; the loss does not have an option, or it is out of range; a reference is missing
            or not allowed; or shapes differ.
    """
    loss = check_preference(name, options)
    chosen, rejected = vectors(chosen=chosen, rejected=rejected)
    references = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    for argument, reference in references.items():
        if loss.reference and reference is None:
            raise ValueError(f"{argument} is None: {name} requires the reference model's summed log-probabilities")
        if not loss.reference and reference is not None:
            raise ValueError(f"{argument} is given, but {name} has no reference model and would ignore it: pass None")
    if loss.reference:
        # without gradient, even if it was computed with the same weights and the adapter switched off
        _, ref_chosen, ref_rejected = vectors(chosen=chosen, **references)
        chosen, rejected = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    if loss.per_token:
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        _, *lengths_of = vectors(chosen=chosen, **lengths)
        for argument, tokens in zip(lengths, lengths_of, strict=True):
            if tokens.device.type == "cpu" and (tokens < 1).any():
                raise ValueError(
                    f"{argument} contains {tokens.min().item():g}: it must be at least 1, because {name} divides by it"
                )
        chosen, rejected = chosen / lengths_of[0], rejected / lengths_of[1]
    losses, reward_chosen, reward_rejected = loss.function(chosen, rejected, **options)
    return losses, {
        "rewards/chosen": mean(reward_chosen),
        "rewards/rejected": mean(reward_rejected),
        "accuracy": mean((reward_chosen > reward_rejected).to(losses.dtype)),
        "margin": mean(reward_chosen - reward_rejected),
    }
