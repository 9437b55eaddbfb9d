"""What every loss asks of its arguments, and the mean that its metrics use."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

# Ranges of the options, by name: (test, in words). An option that is not here may be any finite number.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: x > 0, "above 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5 (at 0.5 a label would say nothing)"),
    **dict.fromkeys(
        ["gamma", "lam", "desirable_weight", "undesirable_weight", "centering"], (lambda x: x >= 0, "at least 0")
    ),
}


def check_numbers(**options: float) -> None:
    """Every option is a finite number in its range."""
    for name, value in options.items():
        # bool is a Real for Python, and a text such as "1e-1" is what YAML makes of a number written without a dot
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        fits, words = _RANGES.get(name, (lambda x: True, "of any size"))
        if not number or not fits(value):
            raise ValueError(f"{name} is {value!r}: it must be a finite number, {words}")


def vectors(**tensors: Tensor | float | None) -> list[Tensor]:
    """The tensors, all of them [B] with the same B, in one dtype.

    Whole numbers and bfloat16 are widened: the dtype is float64 if the first tensor's is, else float32.
    """
    first, found = next(iter(tensors)), list[Tensor]()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {tensor!r}: it must be a tensor of shape [B]")
        found.append(tensor)
        if tensor.ndim != 1 or tensor.shape != found[0].shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: it must be [B], one number per pair or example, with the "
                f"same B as {first}, whose shape is {list(found[0].shape)}"
            )
    if not found[0].is_floating_point():
        raise ValueError(f"{first} has dtype {found[0].dtype}: it must be a floating-point dtype")
    dtype = torch.float64 if found[0].dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in found]


def mean(x: Tensor) -> Tensor:
    """Mean without gradient; 0 of nothing, so that a rank without pairs adds nothing to a weighted mean."""
    return x.detach().sum() / max(x.numel(), 1)
