"""Frozen linears in 4 bits (NF4, 2305.14314), by bitsandbytes; products are in the run's precision."""

import logging

from torch import Tensor, nn

from megavlm.adapters.base_weight import saved_as
from megavlm.base.errors import UserError

BLOCK = 64  # weights that share a scale


class Nf4:
    """A weight [out, in] as bitsandbytes stores it.

    Args:
        double: the scales are in 8 bits, too.
    """

    def __init__(self, weight: Tensor, *, double: bool):
        functional = _bitsandbytes()
        self.packed, self.state = functional.quantize_4bit(
            weight.detach(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )

    def weight(self) -> Tensor:
        """[out, in] in the dtype that it had."""
        return _bitsandbytes().dequantize_4bit(self.packed, self.state)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, scales and all."""
        tensors = [self.packed, self.state.absmax]
        if self.state.nested:
            tensors += [self.state.state2.absmax, self.state.offset]
        return sum(tensor.nbytes for tensor in tensors)


def nbytes_of(numel: int, *, double: bool) -> int:
    """``Nf4.nbytes`` of so many weights."""
    scales = -(-numel // BLOCK)
    return -(-numel // 2) + (scales + 4 * -(-scales // 256) + 4 if double else 4 * scales)


def quantize(linear: nn.Module, *, double: bool) -> None:
    """Puts a frozen linear's weight into 4 bits: ``linear.nf4``. Its forward and backward each work it out anew."""
    linear.nf4 = Nf4(linear.weight, double=double)
    original = linear.forward
    linear._parameters["weight"] = None

    def forward(*args, **kwargs):
        weight = linear.nf4.weight()
        linear.__dict__["weight"] = weight  # found before the empty parameter of that name
        try:
            with saved_as(weight, linear.nf4.weight):
                return original(*args, **kwargs)
        finally:
            del linear.__dict__["weight"]

    linear.forward = forward


def _bitsandbytes():
    try:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a product that is not used here
        from bitsandbytes import functional
    except ImportError:
        raise UserError(
            "adapter.quantize needs the package bitsandbytes, which is not installed",
            "install megavlm[qlora], or set adapter.quantize to null",
        ) from None
    return functional
