"""A linear's weight that is worked out when it is used: how to get it, and how backward gets it without keeping it."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def weight_of(linear: nn.Module) -> Tensor:
    """[out, in] of a linear, also of one in 4 bits."""
    return linear.nf4.weight() if hasattr(linear, "nf4") else linear.weight


def saved_as(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager:
    """Within it autograd keeps ``make`` instead of ``tensor``, and calls it, under no_grad, in backward."""

    # compared by address and shape: the graph keeps ``pack``, which must not keep the tensor
    same = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(saved: Tensor):
        return make if (saved.data_ptr(), saved.shape, saved.stride()) == same else saved

    def unpack(kept) -> Tensor:
        if not callable(kept):
            return kept
        with torch.no_grad():
            return kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
