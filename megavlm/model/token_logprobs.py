"""Token log-probabilities from the last hidden states: vocabulary-parallel, in chunks, recomputed in backward.

A [T, vocabulary] matrix never exists: logits live for ``chunk_tokens`` targets at a time, and positions without a
target cost nothing. Cross-entropy, preference and policy losses all start from here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.platform import to_device


@dataclass
class Targets:
    """Where a row has targets, split as its hidden states are.

    Attributes:
        local: int64 [m] on the device: positions in this rank's slice of the row, padded with 0 to the longest's m.
        tokens: int64 [slices, m]: the token to be predicted at each position of every slice, 0 where padded.
        weights: float32 [slices, m]: loss weights, 0 where padded.
        row_index: int64 [slices, m] on the host: position in the row, -1 where padded.
    """

    local: Tensor
    tokens: Tensor
    weights: Tensor
    row_index: Tensor

    @classmethod
    def of(cls, labels: Tensor, loss_weights: Tensor, slices: int, rank: int, device: torch.device) -> "Targets":
        """From host tensors labels int64 [T] (-100: no target) and loss_weights float32 [T].

        ``slices``: equal parts into which sequence parallelism cuts the row (1: none); ``rank``: which is ours.
        """
        length = labels.shape[0] // slices
        found = [(labels[s * length : (s + 1) * length] != -100).nonzero().flatten() for s in range(slices)]
        longest = max(len(positions) for positions in found)
        row_index = torch.full((slices, longest), -1)
        for s, positions in enumerate(found):
            row_index[s, : len(positions)] = positions + s * length
        there = row_index >= 0
        at = row_index.clamp(min=0)
        move = lambda x: to_device(x, device)
        return cls(
            local=move(torch.where(there[rank], at[rank] - rank * length, 0)),
            tokens=move(torch.where(there, labels[at], 0)),
            weights=move(torch.where(there, loss_weights[at], 0.0)),
            row_index=row_index,
        )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    group: dist.ProcessGroup,
    *,
    sequence_parallel: bool,
    chunk_tokens: int,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) for every target of a row, the same on every rank of ``group``.

    Args:
        hidden: [t, hidden], this rank's slice of the row (the whole row without sequence parallelism).
        weight: [vocabulary / ranks, hidden], this rank's rows of the output weight.
        targets: see ``Targets``.
        group: tensor-parallel ranks.
        chunk_tokens: targets whose logits exist at one time.
        entropy: also return the entropy of each distribution in nats (without gradient).
    Returns:
        float32 [slices, m] log-probabilities, and entropies of the same shape or None.
    """
    return _TokenLogprobs.apply(
        hidden, weight, targets.local, targets.tokens, group, sequence_parallel, chunk_tokens, entropy
    )


def token_kl(
    hidden: Tensor,
    weight: Tensor,
    start_states: Tensor,
    start_weight: Tensor,
    targets: Targets,
    group: dist.ProcessGroup,
    *,
    sequence_parallel: bool,
    chunk_tokens: int,
) -> Tensor:
    """KL(p ‖ q) in nats, over the whole vocabulary, at every target of a row; the same on every rank of ``group``.

    Args:
        hidden, weight: of p, as in ``token_logprobs``; they get gradients.
        start_states, start_weight: of q: [m, hidden], the last hidden states at ``targets.local``, and as ``weight``.
    Returns:
        float32 [slices, m].
    """
    return _TokenKl.apply(
        hidden,
        weight,
        start_states,
        start_weight,
        targets.local,
        targets.tokens,
        group,
        sequence_parallel,
        chunk_tokens,
    )


def vocabulary_logits(
    hidden: Tensor, weight: Tensor, positions: Tensor, group: dist.ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """float32 [n, vocabulary] at ``positions`` [n] of the whole row, on every rank. For generation: no gradient."""
    if sequence_parallel:
        hidden = _gather(hidden, group)
    local = (hidden[positions] @ weight.t()).float()  # [n, vocabulary / ranks]
    if group.size() == 1:
        return local
    return torch.cat(_gather(local[None], group).unbind(0), dim=-1)


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, …] of every rank, one after the other: [ranks * n, …]."""
    out = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(out, part.contiguous(), group=group)
    return out


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local, tokens, group, sequence_parallel, chunk_tokens, entropy):
        ctx.group, ctx.gather = group, sequence_parallel and group.size() > 1
        ctx.chunk = max(1, chunk_tokens // tokens.shape[0])
        ctx.first = group.rank() * weight.shape[0]  # first vocabulary entry of this rank
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        for start in range(0, tokens.shape[1], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            states = _chunk_states(ctx, hidden, local[part])
            logits = (states @ weight.t()).float()  # [slices * c, vocabulary / ranks]
            top = logits.max(-1).values
            if group.size() > 1:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            exp = (logits - top[:, None]).exp_()
            index, inside = _in_shard(ctx, tokens[:, part], weight.shape[0])
            chosen = torch.where(inside, logits.gather(1, index[:, None]).squeeze(1), 0.0)
            sums = [exp.sum(-1), chosen]
            if entropy:
                sums.append((exp * logits).sum(-1))
            sums = torch.stack(sums)
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            z = top + sums[0].log()
            shape = tokens[:, part].shape
            logprobs[:, part] = (sums[1] - z).view(shape)
            log_z[:, part] = z.view(shape)
            if entropy:
                entropies[:, part] = (z - sums[2] / sums[0]).view(shape)
        ctx.save_for_backward(hidden, weight, local, tokens, log_z)
        if entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, local, tokens, log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over many chunks, so in float32 whatever the weight's type
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, tokens.shape[1], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            states = _chunk_states(ctx, hidden, local[part])
            grad = grad_logprobs[:, part].reshape(-1, 1)
            logits = (states @ weight.t()).float()
            grad_logits = (logits - log_z[:, part].reshape(-1, 1)).exp_().mul_(-grad)
            index, inside = _in_shard(ctx, tokens[:, part], weight.shape[0])
            grad_logits.scatter_add_(1, index[:, None], grad * inside[:, None])
            _add_gradients(ctx, grad_logits, states, weight, local[part], grad_hidden, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _TokenKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, start, start_weight, local, tokens, group, sequence_parallel, chunk_tokens):
        ctx.group, ctx.gather = group, sequence_parallel and group.size() > 1
        ctx.chunk = max(1, chunk_tokens // tokens.shape[0])
        kl, log_z, start_log_z = (
            torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        for first in range(0, tokens.shape[1], ctx.chunk):
            part = slice(first, first + ctx.chunk)
            logits = (_chunk_states(ctx, hidden, local[part]) @ weight.t()).float()
            start_logits = (_gathered(ctx, start[part]) @ start_weight.t()).float()
            z, start_z = _log_sums(ctx, logits), _log_sums(ctx, start_logits)
            gaps = (logits - z[:, None]) - (start_logits - start_z[:, None])  # log p - log q
            sums = ((logits - z[:, None]).exp_() * gaps).sum(-1)
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            for whole, values in ((kl, sums), (log_z, z), (start_log_z, start_z)):
                whole[:, part] = values.view(tokens.shape[0], -1)
        ctx.save_for_backward(hidden, weight, start, start_weight, local, kl, log_z, start_log_z)
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        """∂KL/∂logit = p (log p - log q - KL)."""
        hidden, weight, start, start_weight, local, kl, log_z, start_log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for first in range(0, kl.shape[1], ctx.chunk):
            part = slice(first, first + ctx.chunk)
            column = lambda x, part=part: x[:, part].reshape(-1, 1)
            states = _chunk_states(ctx, hidden, local[part])
            logs = (states @ weight.t()).float() - column(log_z)
            gaps = logs - ((_gathered(ctx, start[part]) @ start_weight.t()).float() - column(start_log_z))
            grad_logits = logs.exp_().mul_(gaps - column(kl)).mul_(column(grad_kl))
            _add_gradients(ctx, grad_logits, states, weight, local[part], grad_hidden, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _add_gradients(ctx, grad_logits, states, weight, local, grad_hidden, grad_weight) -> None:
    """Adds a chunk's share to the gradients that are wanted. grad_logits: float32 [n, vocabulary / ranks]."""
    grad_logits, group = grad_logits.to(weight.dtype), ctx.group
    if grad_weight is not None:
        grad_weight += grad_logits.t() @ states
    if grad_hidden is not None:
        grad_states = grad_logits @ weight  # a partial sum: this rank's vocabulary only
        if ctx.gather:
            mine = grad_states.new_empty(grad_states.shape[0] // group.size(), grad_states.shape[1])
            dist.reduce_scatter_tensor(mine, grad_states, group=group)
            grad_states = mine
        elif group.size() > 1:
            dist.all_reduce(grad_states, group=group)
        grad_hidden.index_add_(0, local, grad_states)


def _log_sums(ctx, logits: Tensor) -> Tensor:
    """float32 [n]: log Σ exp over the whole vocabulary."""
    if ctx.group.size() == 1:
        return logits.logsumexp(-1)
    top = logits.max(-1).values
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=ctx.group)
    sums = (logits - top[:, None]).exp_().sum(-1)
    dist.all_reduce(sums, group=ctx.group)
    return top + sums.log()


def _gathered(ctx, states: Tensor) -> Tensor:
    return _gather(states, ctx.group) if ctx.gather else states


def _chunk_states(ctx, hidden: Tensor, local: Tensor) -> Tensor:
    """[slices * c, hidden]: the states of this chunk's targets, of every slice."""
    return _gathered(ctx, hidden.index_select(0, local))


def _in_shard(ctx, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Index of each target in this rank's vocabulary rows, and whether it lies there: int64 [n], bool [n]."""
    index = tokens.reshape(-1) - ctx.first
    inside = (index >= 0) & (index < size)
    return torch.where(inside, index, 0), inside
