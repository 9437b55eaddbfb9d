"""What fused kernels make and keep, as functions of autograd on the meta device, where nothing is computed.

Each makes tensors of the sizes that a kernel of Transformer Engine, or one of Megatron's compiled functions, gives
back, and keeps for the backward pass what that keeps. Workspaces within a kernel are left out, as everywhere in a plan.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Norm(torch.autograd.Function):
    """A norm that keeps its input and the reciprocal deviation of each row: x [..., n] -> [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()  # the heads of queries and keys are pieces of a larger tensor, and are copied
        ctx.save_for_backward(x, weight, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class LinearProduct(torch.autograd.Function):
    """A product that adds the weight's gradient to its buffer, and gives autograd a ``stand_in`` for it.

    x [..., in] -> [..., out]. With ``gather``, x is a slice of the tokens: they are gathered for the product, and again
    in the backward pass, and only the slice is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stand_in: Tensor, gather: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.stand_in, ctx.ranks = bias, stand_in, 1 if gather is None else gather.size()
        whole = _gathered(x, ctx.ranks)
        return whole.new_empty(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = _gathered(x, ctx.ranks)
        grad_x = torch.empty_like(whole)
        if ctx.ranks > 1:
            grad_x = torch.empty_like(x)
        grad_bias = None if ctx.bias is None else torch.empty_like(ctx.bias)
        return grad_x, _in_the_buffer(weight, ctx.stand_in), grad_bias, None, None


def _gathered(x: Tensor, ranks: int) -> Tensor:
    return x if ranks == 1 else x.new_empty(x.shape[0] * ranks, *x.shape[1:])


def _in_the_buffer(weight: Tensor, stand_in: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in Megatron's buffer already."""
    if not weight.requires_grad:
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's
    return stand_in.detach()


class GroupedProduct(torch.autograd.Function):
    """The products of all experts of a rank, each with its own tokens: x [tokens, in] -> [tokens, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stand_in: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.stand_in = stand_in
        return x.new_empty(x.shape[0], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        return torch.empty_like(x), None, *[_in_the_buffer(weight, ctx.stand_in) for weight in weights]


class GatedActivation(torch.autograd.Function):
    """SwiGLU: x [..., 2n] -> [..., n], times the probabilities of an expert's tokens, float32 [..., 1], if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, probs)
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probs = ctx.saved_tensors
        return torch.empty_like(x), None if probs is None else torch.empty_like(probs)


class BiasActivation(torch.autograd.Function):
    """GELU of the sum of x [..., n] and a bias [n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(bias)


class Rotation(torch.autograd.Function):
    """The rotary embedding of x [T, 1, heads, head_dim], which keeps only the angles, float32 [T, 1, 1, head_dim]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty(grad.shape), None


class Attention(torch.autograd.Function):
    """Fused attention, which keeps its arguments, its result and a float32 for each token and head.

    query [T, heads, head_dim], key and value [T, kv_heads, head_dim] -> [T, heads, head_dim].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        ctx.save_for_backward(query, key, value, out, query.new_empty(*query.shape[:2], 1, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.new_empty(one.shape) for one in ctx.saved_tensors[:3])
