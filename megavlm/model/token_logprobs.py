"""Token log-probabilities from the last hidden states: vocabulary-parallel, in chunks, recomputed in the backward pass.

The full logits matrix [T, vocabulary] is never materialised: logits exist for ``chunk_tokens`` targets at a time.
Positions without a target cost nothing. All losses start from these functions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.model.targets import Targets
from megavlm.platform.products import add_product, product
from megavlm.platform.softmax import exponential_sums, log_sums, logit_gradients


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    group: dist.ProcessGroup,
    *,
    sequence_parallel: bool,
    chunk_tokens: int,
    entropy: bool = False,
    temperature: float = 1.0,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Computes log p(target) for every target of a row. The result is the same on every rank of ``group``.

    Args:
        hidden: [t, hidden], this rank's slice of the row (the whole row without sequence parallelism).
        weight: [vocabulary / ranks, hidden], this rank's rows of the output weight.
        targets: the targets of the row.
        group: tensor-parallel ranks.
        sequence_parallel: whether the ranks have different slices of the row.
        chunk_tokens: number of targets whose logits exist at a time.
        entropy: whether to return the entropy of each distribution in nats, too (without gradient).
        temperature: p is the softmax of the logits divided by this positive number.
        sums: whether to return log Σ exp(logit) and the mean of the logits over the vocabulary (with gradients; only at
            temperature 1).

    Returns:
        The log-probabilities, float32 [slices, m], and the entropies in the same shape or None; with ``sums``, both of
        these instead of the entropies.
    """
    assert not sums or temperature == 1.0
    logprobs, entropies, log_z, means = _TokenLogprobs.apply(
        *(hidden, weight, targets.local, targets.tokens, group, sequence_parallel),
        *(chunk_tokens, entropy, temperature, sums),
    )
    return (logprobs, log_z, means) if sums else (logprobs, entropies)


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
    """Computes KL(p ‖ q) in nats at every target of a row. The result is the same on every rank of ``group``.

    Args:
        hidden, weight: hidden states and output weight of p, as in ``token_logprobs``; they get gradients.
        start_states: hidden states of q at ``targets.local``, [m, hidden].
        start_weight: output weight of q, as ``weight``.
        targets, group, sequence_parallel, chunk_tokens: as in ``token_logprobs``.

    Returns:
        The divergences over the whole vocabulary, float32 [slices, m].
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
    """Logits float32 [n, vocabulary] at ``positions`` [n] of the whole row, on every rank. They have no gradient."""
    if sequence_parallel:
        hidden = _gather(hidden, group)
    local = product(hidden[positions], weight.t())  # [n, vocabulary / ranks]
    if group.size() == 1:
        return local
    return torch.cat(_gather(local[None], group).unbind(0), dim=-1)


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, …] of every rank -> [ranks * n, …], in the order of the ranks."""
    out = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(out, part.contiguous(), group=group)
    return out


class _Context(torch.autograd.function.FunctionCtx):
    """What autograd passes from forward to backward, with the attributes that the functions below set."""

    group: dist.ProcessGroup
    weight: Tensor  # the parameter itself, whose attributes Megatron sets
    gather: bool
    chunk: int
    first: int
    temperature: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        tokens: Tensor,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        chunk_tokens: int,
        entropy: bool,
        temperature: float,
        with_sums: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.group, ctx.gather, ctx.temperature = group, sequence_parallel and group.size() > 1, temperature
        ctx.weight = weight
        ctx.chunk = max(1, chunk_tokens // tokens.shape[0])
        ctx.first = group.rank() * weight.shape[0]  # first vocabulary entry of this rank
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        means = torch.empty_like(logprobs) if with_sums else None
        for start in range(0, tokens.shape[1], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            states = _chunk_states(ctx, hidden, local[part])
            logits = _scaled(ctx, product(states, weight.t()))  # [slices * c, vocabulary / ranks]
            top = logits.max(-1).values
            if group.size() > 1:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            index, inside = _in_shard(ctx, tokens[:, part], weight.shape[0])
            chosen = torch.where(inside, logits.gather(1, index[:, None]).squeeze(1), 0.0)
            exp, *more = exponential_sums(logits, top, products=entropy, plain=with_sums)
            del logits  # so that its memory is free while the next chunk is made
            sums = torch.stack([exp, chosen, *more])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            z = top + sums[0].log()
            shape = tokens[:, part].shape
            logprobs[:, part] = (sums[1] - z).view(shape)
            log_z[:, part] = z.view(shape)
            if entropies is not None:
                entropies[:, part] = (z - sums[2] / sums[0]).view(shape)
            if means is not None:
                means[:, part] = (sums[-1] / (group.size() * weight.shape[0])).view(shape)
        ctx.save_for_backward(hidden, weight, local, tokens, log_z)
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies, log_z if with_sums else None, means

    @staticmethod
    def backward(
        ctx: _Context, grad_logprobs: Tensor, _: Tensor | None, grad_log_z: Tensor | None, grad_means: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """∂log p/∂logit = [target] - p, ∂log_z/∂logit = p, ∂mean/∂logit = 1 / vocabulary."""
        hidden, weight, local, tokens, log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(ctx) if ctx.needs_input_grad[1] else None
        for start in range(0, tokens.shape[1], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            states = _chunk_states(ctx, hidden, local[part])
            grad = _scaled(ctx, grad_logprobs[:, part].clone().reshape(-1, 1))
            logits = _scaled(ctx, product(states, weight.t()))
            share = -grad if grad_log_z is None else grad_log_z[:, part].reshape(-1, 1) - grad
            index, inside = _in_shard(ctx, tokens[:, part], weight.shape[0])
            size, z = ctx.group.size() * weight.shape[0], log_z[:, part].reshape(-1, 1)
            mean = None if grad_means is None else grad_means[:, part].reshape(-1, 1) / size
            grad_logits = logit_gradients(logits, z, share, index, grad * inside[:, None], mean, weight.dtype)
            del logits
            _add_gradients(ctx, grad_logits, states, weight, local[part], grad_hidden, grad_weight)
            del grad_logits
        return grad_hidden, _given_to_autograd(ctx, grad_weight), *[None] * 8


class _TokenKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        start: Tensor,
        start_weight: Tensor,
        local: Tensor,
        tokens: Tensor,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.group, ctx.gather, ctx.weight = group, sequence_parallel and group.size() > 1, weight
        ctx.chunk = max(1, chunk_tokens // tokens.shape[0])
        kl, log_z, start_log_z = (
            torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        for first in range(0, tokens.shape[1], ctx.chunk):
            part = slice(first, first + ctx.chunk)
            logits = product(_chunk_states(ctx, hidden, local[part]), weight.t())
            start_logits = product(_gathered(ctx, start[part]), start_weight.t())
            z, start_z = log_sums(logits, group), log_sums(start_logits, group)
            logs = logits.sub_(z[:, None])
            gaps = start_logits.sub_(start_z[:, None]).neg_().add_(logs)  # log p - log q
            sums = logs.exp_().mul_(gaps).sum(-1)
            del logits, start_logits, logs, gaps  # so that their memory is free while the next chunk is made
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            for whole, values in ((kl, sums), (log_z, z), (start_log_z, start_z)):
                whole[:, part] = values.view(tokens.shape[0], -1)
        ctx.save_for_backward(hidden, weight, start, start_weight, local, kl, log_z, start_log_z)
        return kl

    @staticmethod
    def backward(ctx: _Context, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        """∂KL/∂logit = p (log p - log q - KL)."""
        hidden, weight, start, start_weight, local, kl, log_z, start_log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(ctx) if ctx.needs_input_grad[1] else None
        for first in range(0, kl.shape[1], ctx.chunk):
            part = slice(first, first + ctx.chunk)
            column = lambda x, part=part: x[:, part].reshape(-1, 1)
            states = _chunk_states(ctx, hidden, local[part])
            logs = product(states, weight.t()).sub_(column(log_z))
            start_logs = product(_gathered(ctx, start[part]), start_weight.t()).sub_(column(start_log_z))
            gaps = start_logs.neg_().add_(logs)
            grad_logits = logs.exp_().mul_(gaps.sub_(column(kl))).mul_(column(grad_kl))
            del start_logs, gaps
            _add_gradients(ctx, grad_logits, states, weight, local[part], grad_hidden, grad_weight)
            del logs, grad_logits
        return grad_hidden, _given_to_autograd(ctx, grad_weight), *[None] * 7


def _weight_gradient(ctx: _Context) -> Tensor:
    """Where the weight's gradient is summed over chunks, in float32: Megatron's gradient buffer, if there is one."""
    buffer = getattr(ctx.weight, "main_grad", None)
    if buffer is not None and buffer.dtype == torch.float32:
        return buffer
    return torch.zeros_like(ctx.weight, dtype=torch.float32)


def _given_to_autograd(ctx: _Context, grad: Tensor | None) -> Tensor | None:
    """The gradient for autograd. If it is in the buffer already, a stand-in, as by Megatron's fused linear layers.

    Megatron's DDP must be called for each weight, and leaves a stand-in out by ``grad_added_to_main_grad``. The word
    embedding of a tied model shares the weight and has a gradient of its own, to which the stand-in is added.
    """
    weight = ctx.weight
    if grad is None or grad is not getattr(weight, "main_grad", None):
        return grad if grad is None else grad.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _add_gradients(
    ctx: _Context,
    grad_logits: Tensor,
    states: Tensor,
    weight: Tensor,
    local: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Adds the contribution of a chunk to the gradients that are not None. grad_logits: [n, vocab / ranks]."""
    grad_logits, group = grad_logits.to(weight.dtype), ctx.group
    if grad_weight is not None:
        add_product(grad_weight, grad_logits.t(), states)
    if grad_hidden is not None:
        grad_states = grad_logits @ weight  # a partial sum over this rank's part of the vocabulary
        if ctx.gather:
            mine = grad_states.new_empty(grad_states.shape[0] // group.size(), grad_states.shape[1])
            dist.reduce_scatter_tensor(mine, grad_states, group=group)
            grad_states = mine
        elif group.size() > 1:
            dist.all_reduce(grad_states, group=group)
        grad_hidden.index_add_(0, local, grad_states)


def _scaled(ctx: _Context, values: Tensor) -> Tensor:
    """A tensor of which nobody else has a view, divided by the temperature in place."""
    return values if ctx.temperature == 1.0 else values.div_(ctx.temperature)


def _gathered(ctx: _Context, states: Tensor) -> Tensor:
    return _gather(states, ctx.group) if ctx.gather else states


def _chunk_states(ctx: _Context, hidden: Tensor, local: Tensor) -> Tensor:
    """The hidden states of this chunk's targets in every slice, [slices * c, hidden]."""
    return _gathered(ctx, hidden.index_select(0, local))


def _in_shard(ctx: _Context, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The index of each target in this rank's vocabulary rows, int64 [n], and whether it is there, bool [n]."""
    index = tokens.reshape(-1) - ctx.first
    inside = (index >= 0) & (index < size)
    return torch.where(inside, index, 0), inside
