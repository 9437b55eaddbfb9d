"""How config.json stretches the decoder's rotary frequencies to contexts longer than the pretrained one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted

ROPE_TYPES = ("default", "linear", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """Linear interpolation (arXiv:2306.15595) or YaRN (arXiv:2309.00071).

    Attributes:
        factor: by which frequencies are divided: all of them (linear), or those that are slow (YaRN).
        ramp: None for linear. For YaRN, the indices of two frequencies: those before the first stay as they are, those
            after the second are divided by ``factor``, and in between the share of the division rises linearly.
        attention_factor: factor on rotated queries and on rotated keys.
    """

    factor: float
    ramp: tuple[float, float] | None = None
    attention_factor: float = 1.0


def rope_scaling(rope: Mapping[str, Any], head_dim: int, max_positions: int, where: str) -> RopeScaling | None:
    """Reads ``rope_parameters`` as transformers completes them. Returns None for frequencies that are not scaled.

    Args:
        rope: the field ``rope_parameters`` of transformers' text configuration.
        head_dim: width of an attention head.
        max_positions: ``max_position_embeddings``.
        where: file and name of the field, for messages.

    Raises:
        UserError: the type of scaling is not implemented, or a number is missing or out of range.
    """
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{where} has rope_type {quoted(kind)}, which megavlm does not implement; allowed: {', '.join(ROPE_TYPES)}",
            "use a config.json with one of these",
        )
    for name, only in (("partial_rotary_factor", 1.0), ("mrope_interleaved", True)):
        if rope.get(name, only) != only:
            raise UserError(
                f"{where} has {name} {quoted(rope[name])}; megavlm implements only {only}", f"remove {name}"
            )

    def number(name: str, default: float | None = None, fits: Callable[[float], bool] = lambda x: x > 0) -> float:
        value = default if rope.get(name) is None else rope[name]
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not real or not math.isfinite(value) or not fits(value):
            raise UserError(f"{where} has {name} {quoted(value)}, which is out of range", "correct the number")
        return float(value)

    theta = number("rope_theta", fits=lambda x: x > 1)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(number("factor"))
    original = number("original_max_position_embeddings")
    factor = number("factor", max_positions / original)

    def index_of(rotations: float) -> float:
        """The (fractional) index of the frequency that turns this often within the pretrained context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(number("beta_fast", 32.0)), index_of(number("beta_slow", 1.0))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    return RopeScaling(factor, (max(first, 0), min(last, head_dim - 1)), _attention_factor(rope, factor, number))


def _attention_factor(rope: Mapping[str, Any], factor: float, number: Callable[..., float]) -> float:
    if rope.get("attention_factor") is not None:
        return number("attention_factor")
    stretched = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return stretched(number("mscale")) / stretched(number("mscale_all_dim"))
    return stretched(1.0)
