"""Frozen linear layers with weights in 4 bits (NF4, arXiv:2305.14314), using bitsandbytes.

Weights are dequantized before each product, which is computed in the precision of the run.
"""

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from megavlm.adapters.base_weight import saved_as
from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat

BLOCK = 64  # number of weights that share a scale


class Nf4:
    """A weight [out, in] as bitsandbytes stores it.

    Args:
        weight: the weight to quantize.
        double: also quantize the scales, to 8 bits (double quantization).
    """

    def __init__(self, weight: Tensor, *, double: bool):
        functional = _bitsandbytes()
        self.packed, self.state = functional.quantize_4bit(
            weight.detach(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )

    def weight(self) -> Tensor:
        """The dequantized weight [out, in] in its original dtype."""
        return _bitsandbytes().dequantize_4bit(self.packed, self.state)

    def tensors(self) -> list[Tensor]:
        """What it is stored in: the numbers and their scales."""
        scales = [self.state.state2.absmax, self.state.offset] if self.state.nested else []
        return [self.packed, self.state.absmax, *scales]

    @property
    def nbytes(self) -> int:
        """Size in bytes, including the scales."""
        return sum(tensor.nbytes for tensor in self.tensors())


def nbytes_of(numel: int, *, double: bool) -> int:
    """The value of ``Nf4.nbytes`` for ``numel`` weights."""
    scales = -(-numel // BLOCK)
    return -(-numel // 2) + (scales + 4 * -(-scales // 256) + 4 if double else 4 * scales)


def quantize(linear: nn.Module, *, double: bool) -> None:
    """Replaces the weight of a frozen linear layer by ``linear.nf4``. Forward and backward each dequantize it again."""
    _replace(linear, Nf4(cast(Tensor, linear.weight), double=double))
    beat("quantizing a layer")


def share_quantized(linears: Sequence[nn.Module], others: Sequence[nn.Module]) -> None:
    """Gives each of ``linears`` the quantized weight of the same layer of another model, if that is quantized."""
    for linear, other in zip(linears, others, strict=True):
        if (quantized := getattr(other, "nf4", None)) is not None:
            _replace(linear, quantized)


def _replace(linear: nn.Module, quantized: Nf4) -> None:
    linear.nf4 = quantized  # type: ignore[assignment]  # modules may have any attribute
    original = linear.forward
    linear._parameters["weight"] = None

    def forward(*args: Any, **kwargs: Any) -> Any:
        weight = quantized.weight()
        linear.__dict__["weight"] = weight  # attribute access finds it before the empty parameter of that name
        try:
            with saved_as(weight, quantized.weight):
                return original(*args, **kwargs)
        finally:
            del linear.__dict__["weight"]

    linear.forward = forward


def _bitsandbytes() -> ModuleType:
    try:
        # it warns about a slow product that is not used here
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from bitsandbytes import functional
    except ImportError:
        raise UserError(
            "adapter.quantize requires the package bitsandbytes, which is not installed",
            "install megavlm[qlora], or set adapter.quantize to null",
        ) from None
    return functional
