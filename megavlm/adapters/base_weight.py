"""Weights of linear layers that are computed when needed, in the forward pass and again in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer, dequantized if it is stored in 4 bits."""
    quantized = getattr(linear, "nf4", None)
    return quantized.weight() if quantized is not None else cast(Tensor, linear.weight)


def saved_as(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager:
    """A context in which autograd saves ``make`` instead of ``tensor`` and calls it in backward, under no_grad."""

    # Compared by address and shape, because the graph references ``pack``, which must not reference the tensor.
    same = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return make if (saved.data_ptr(), saved.shape, saved.stride()) == same else saved

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
