"""Sums of exponentials over a vocabulary, and gradients of logits: in one pass over the matrix on CUDA, else in place.

A matrix of logits has some gigabytes, and one operation of torch after the other would read and write all of it. On
CUDA, torch.compile makes one kernel of them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exponential_sums(logits: Tensor, top: Tensor, *, products: bool = False, plain: bool = False) -> list[Tensor]:
    """Sums over the columns of a matrix, which may be overwritten.

    Args:
        logits: float32 [n, vocabulary].
        top: float32 [n], the largest logit of each row.
        products, plain: which further sums to return.

    Returns:
        float32 [n] each: Σ exp(logit - top); with ``products`` Σ logit · exp(logit - top); with ``plain`` Σ logit.
    """
    if logits.is_cuda:
        return _compiled(_sums)(logits, top, products, plain)
    total = [logits.sum(-1)] if plain else []
    exp = (logits.clone() if products else logits).sub_(top[:, None]).exp_()
    return [exp.sum(-1), *([logits.mul_(exp).sum(-1)] if products else []), *total]


def log_sums(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log Σ exp over a vocabulary that is divided over a group: [n, vocabulary / ranks] -> float32 [n]."""
    if group.size() == 1:
        return logits.logsumexp(-1)
    top = logits.max(-1).values
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    sums = (logits - top[:, None]).exp_().sum(-1)
    dist.all_reduce(sums, group=group)
    return top + sums.log()


def logit_gradients(
    logits: Tensor,
    log_z: Tensor,
    share: Tensor,
    index: Tensor,
    grad: Tensor,
    uniform: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """p · share + uniform, and ``grad`` at ``index``, where p = exp(logit - log_z).

    Args:
        logits: float32 [n, vocabulary]; may be overwritten.
        log_z, share, grad: float32 [n, 1].
        index: int64 [n], a column of each row.
        uniform: float32 [n, 1], or None for zero.
        dtype: of the result.

    Returns:
        [n, vocabulary].
    """
    if logits.is_cuda:
        return _compiled(_gradients)(logits, log_z, share, index, grad, uniform, dtype)
    out = logits.sub_(log_z).exp_().mul_(share)
    if uniform is not None:
        out.add_(uniform)
    return out.scatter_add_(1, index[:, None], grad).to(dtype)


def _sums(logits: Tensor, top: Tensor, products: bool, plain: bool) -> list[Tensor]:
    exp = (logits - top[:, None]).exp()
    more = [(logits * exp).sum(-1)] if products else []
    return [exp.sum(-1), *more, *([logits.sum(-1)] if plain else [])]


def _gradients(
    logits: Tensor,
    log_z: Tensor,
    share: Tensor,
    index: Tensor,
    grad: Tensor,
    uniform: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out = (logits - log_z).exp() * share
    if uniform is not None:
        out = out + uniform
    columns = torch.arange(logits.shape[1], device=logits.device)
    return (out + torch.where(columns == index[:, None], grad, 0.0)).to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for matrices of any size, compiled at its first call."""
    return torch.compile(function, dynamic=True)
