"""Checks of the arguments of all losses, and the mean for their metrics."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

# Ranges of the options by name: (test, description). Other options may be any finite number.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: x > 0, "above 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5 (at 0.5, labels would have no effect)"),
    **dict.fromkeys(["epsilon", "epsilon_high", "tau_pos", "tau_neg"], (lambda x: x > 0, "above 0")),
    "dual_clip": (lambda x: x > 1, "above 1"),
    **dict.fromkeys(
        [
            "gamma",
            "lam",
            "desirable_weight",
            "undesirable_weight",
            "centering",
            "eps",
            "ddof",
            "lowest",
            "highest",
            "clip",
        ],
        (lambda x: x >= 0, "at least 0"),
    ),
}


def check_numbers(**options: float | None) -> None:
    """Raises ValueError unless all options are finite numbers in their ranges."""
    for name, value in options.items():
        # bool is a subclass of Real, and YAML reads a number without a dot, such as 1e-1, as text
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        fits, words = _RANGES.get(name, (lambda x: True, "of any size"))
        if not number or not fits(value):
            raise ValueError(f"{name} is {value!r}: it must be a finite number, {words}")


class HasOptions(Protocol):
    """An entry of a table of losses."""

    @property
    def options(self) -> dict[str, float | None]:
        """The options and their defaults."""


def entry_of[Entry: HasOptions](
    table: Mapping[str, Entry], kind: str, name: str, options: Mapping[str, float | None]
) -> Entry:
    """Returns the loss with this name from a table.

    Raises:
        ValueError: there is none, it does not accept the options, or one of them is out of range. None is allowed where
            it is the default.
    """
    loss = table.get(name)
    if loss is None:
        raise ValueError(f"{name!r} is not a {kind} loss: choose one of {', '.join(table)}")
    for option in options:
        if option not in loss.options:
            takers = [other for other, entry in table.items() if option in entry.options]
            raise ValueError(
                f"{name} has no option {option}, only {', '.join(loss.options)}: remove the option"
                + (f", or choose a loss that has it ({', '.join(takers)})" if takers else "")
            )
    given = {
        option: value for option, value in options.items() if value is not None or loss.options[option] is not None
    }
    check_numbers(**given)
    return loss


def vectors(**tensors: Tensor | float | None) -> list[Tensor]:
    """Checks that all arguments are tensors [B] with the same B, and returns them in one dtype.

    The dtype is float64 if that is the first tensor's dtype, otherwise float32.

    Raises:
        ValueError: an argument is not such a tensor, or the first one does not have a floating-point dtype.
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
    """Mean without gradient; 0 for an empty tensor, so that a rank without pairs adds nothing to a weighted mean."""
    return x.detach().sum() / max(x.numel(), 1)
