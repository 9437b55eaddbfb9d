"""The tables of losses and advantages of sampled answers. Torch is not imported, so that a wrong name is refused early.

The functions are in ``losses/policy.py`` and ``losses/advantages.py``, and are found by name when they are needed.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PolicyLoss:
    """An entry of ``POLICY_LOSSES``.

    Attributes:
        name: the function in ``losses/policy.py``: (ratio, advantages, logprobs, **options) -> Surrogate, elementwise
            on tensors of any one shape. Its keyword-only parameters are the options of the loss with their defaults.
        ratio: "token", or "sequence" for the geometric mean over the answer.
        reduction: a key of ``REDUCTIONS``.
        beta: default weight of the divergence from the reference model (k3).
        verb: the method that has this loss.
    """

    name: str
    ratio: str = "token"
    reduction: str = "token"
    beta: float = 0.0
    defaults: Mapping[str, float] | None = None
    verb: str = "grpo"

    @property
    def function(self) -> Callable[..., Any]:
        """The loss itself."""
        return function_of("policy", self.name)

    @property
    def options(self) -> dict[str, float | None]:
        """The options of this loss and their defaults, without those that all losses have."""
        return keyword_options(self.function) | dict(self.defaults or {})


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss("clip", verb="ppo"),
    "grpo": PolicyLoss("clip", reduction="sequence", beta=0.03),
    "dr_grpo": PolicyLoss("clip", reduction="constant"),
    "dapo": PolicyLoss("clip", defaults={"epsilon_high": 0.28}),
    "gspo": PolicyLoss(
        "clip", ratio="sequence", reduction="sequence", defaults={"epsilon": 3e-4, "epsilon_high": 4e-4}
    ),
    "sapo": PolicyLoss("sapo", reduction="sequence"),
    "cispo": PolicyLoss("cispo"),
}

ADVANTAGES: dict[str, str] = {"grpo": "grpo", "dr_grpo": "dr_grpo", "rloo": "rloo"}
"""By name, the function in ``losses/advantages.py``: (rewards [groups, group_size] with 0 where unknown, bool of the
same shape, **options) -> the same shape."""

GAE = "gae"
"""The advantage of ppo: that of a token, from the values of a critic."""


def losses_of(verb: str) -> tuple[str, ...]:
    """The names that ``align.loss`` may have; the first one is meant by null."""
    return tuple(name for name, entry in POLICY_LOSSES.items() if entry.verb == verb)


def advantages_of(verb: str) -> tuple[str, ...]:
    """The names that ``align.advantage`` may have."""
    return (GAE,) if verb == "ppo" else tuple(ADVANTAGES)


def function_of(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of ``losses``, which is imported now."""
    found: Callable[..., Any] = getattr(importlib.import_module(f"megavlm.align.losses.{module}"), name)
    return found


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a loss or an advantage, which are its keyword-only parameters, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
