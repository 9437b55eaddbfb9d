"""A mode in which the numbers of a token do not depend on what is computed beside it, at whatever cost in speed.

Libraries choose the order of a sum by the shape of a call, so the same token may get other last bits in a prompt, as
the newest token of an answer and in a packed row of training. Here matrix products, long sums and activations are
computed row by row, and attention query by query, always in calls of the same shape. In one process the
log-probabilities of sampling and of a forward pass of training are then equal to the bit. (A mode for tests, and to
find out what another difference comes from.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_LONG = 16384  # PyTorch divides a sum among threads from 32,768 numbers on
_active = 0


def is_batch_invariant() -> bool:
    """Whether the mode is on."""
    return _active > 0


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within the block the mode is on; with ``on`` false the block changes nothing."""
    global _active
    if not on:
        yield
        return
    _active += 1
    try:
        with _RowByRow():
            yield
    finally:
        _active -= 1


class _RowByRow(TorchDispatchMode):
    """Replaces operations whose last bits depend on the shape of their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        return replacement(func, args, kwargs) if replacement is not None else func(*args, **kwargs)


def _mm(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    left, right = args
    # a copy of each row begins at the same alignment, on which kernels depend, too
    return _stacked([func(row[None].clone(), right) for row in left], lambda: func(left, right))


def _addmm(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    bias, left, right = args
    if bias.dim() > 1:
        return func(*args, **kwargs)
    return _stacked([func(bias, row[None].clone(), right, **kwargs) for row in left], lambda: func(*args, **kwargs))


def _reduction(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    """A reduction over the last dimension. Only long rows are divided among threads, in a way that depends on all."""
    x, dims, *rest = args
    if x.dim() < 2 or x.shape[-1] < _LONG or [dim % x.dim() for dim in dims or []] != [x.dim() - 1]:
        return func(*args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    out = _stacked([func(row[None].clone(), [1], *rest, **kwargs) for row in rows], lambda: func(rows, [1], *rest))
    return out.view(*x.shape[:-1], *out.shape[1:])


def _activation(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    """An elementwise function whose last bits depend on whether an element is in a whole vector or at an end."""
    x = args[0]
    rows = x.reshape(-1, x.shape[-1])
    return _stacked([func(row[None].clone(), **kwargs) for row in rows], lambda: func(rows, **kwargs)).view(x.shape)


def _stacked(rows: list[Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    return torch.cat(rows) if rows else otherwise()


_REPLACED: dict[Any, Callable[[Callable[..., Tensor], tuple, dict], Tensor]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.sum.dim_IntList: _reduction,
    _aten.mean.dim: _reduction,
    _aten.silu.default: _activation,
    _aten.gelu.default: _activation,
    _aten.sigmoid.default: _activation,
}


def attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of one query to all keys.

    Args:
        query: [heads, head_dim].
        keys, values: [n, kv_heads, head_dim].
        scale: factor on the products of query and keys.

    Returns:
        [heads, head_dim].
    """
    contiguous = lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # [kv_heads, n, head_dim]
    grouped = query.view(keys.shape[1], -1, query.shape[-1]).clone()
    products = torch.bmm(grouped, contiguous(keys).transpose(1, 2)).float() * scale
    return torch.bmm(products.softmax(-1).to(values.dtype), contiguous(values)).reshape(query.shape)
