"""Sorting tokens by expert: answers for TE's Triton kernels (transformer_engine.pytorch.triton.permutation)."""

import torch
from torch import Tensor


def make_row_id_map(routing_map, tokens, experts):
    """bool [tokens, experts] -> int32 [tokens, 2 · experts + 1]: places among the sorted rows, their experts, how many.

    Rows are sorted by expert, those of an expert by token. Of each token the first entries of both kinds count.
    """
    chosen = routing_map.bool()
    place = chosen.t().flatten().cumsum(0).view(experts, tokens).t() - 1
    first = (~chosen).int().sort(dim=1, stable=True).indices  # chosen experts to the front
    counts = chosen.sum(1, keepdim=True)
    return torch.cat((place.gather(1, first), first, counts), 1).int()


def _pairs(rows: Tensor, experts: int, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, row) of each choice."""
    token, entry = (torch.arange(experts) < rows[:, -1:]).nonzero(as_tuple=True)
    expert, row = rows[token, experts + entry].long(), rows[token, entry].long()
    return token, expert, row if pad_offsets is None else row + pad_offsets[expert]


def permute_with_mask_map(x, rows, probs, scale, pad_offsets, tokens, experts, out_tokens, hidden, scale_hidden):
    """(x of each choice, scales of each choice, probabilities of each choice), sorted."""
    token, expert, row = _pairs(rows, experts, pad_offsets)
    place = lambda values: values.new_zeros(out_tokens, *values.shape[1:]).index_copy_(0, row, values)
    return (
        place(x[token]),
        None if scale is None else place(scale[token]),
        None if probs is None else place(probs[token, expert]),
    )


def unpermute_with_mask_map(x, rows, merging_probs, permuted_probs, pad_offsets, tokens, experts, hidden):
    """(the sum over the choices of each token, the probability of each choice at its token and expert)."""
    token, expert, row = _pairs(rows, experts, pad_offsets)
    values = x[row].float()
    if merging_probs is not None:
        values = values * merging_probs[token, expert, None]
    out = x.new_zeros(tokens, hidden, dtype=torch.float32).index_add_(0, token, values).to(x.dtype)
    if permuted_probs is None:
        return out, None
    probs = permuted_probs.new_zeros(tokens, experts)
    probs[token, expert] = permuted_probs[row]
    return out, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    grad, rows, x, merging_probs, pad_offsets, tokens, experts, out_tokens, hidden
):
    """Gradients of what ``unpermute_with_mask_map`` got: x and ``merging_probs``."""
    token, expert, row = _pairs(rows, experts, pad_offsets)
    dx = grad.new_zeros(out_tokens, hidden)
    dx[row] = (grad[token].float() * merging_probs[token, expert, None]).to(grad.dtype)
    dprobs = torch.zeros_like(merging_probs)
    dprobs[token, expert] = (grad[token].float() * x[row].float()).sum(-1).to(dprobs.dtype)
    return dx, dprobs


def make_chunk_sort_map(sizes, order, tokens, chunks):
    """int32 [tokens]: where each row goes when the chunks of these sizes are put into this order."""
    sizes = sizes.long()
    starts = sizes.cumsum(0) - sizes
    source = torch.cat([torch.arange(starts[i], starts[i] + sizes[i]) for i in order.tolist()])
    places = torch.empty(tokens, dtype=torch.int32)
    places[source] = torch.arange(tokens, dtype=torch.int32)
    return places


def sort_chunks_by_map(x, places, probs, tokens, hidden, is_forward):
    """(x, probs) with each row at its place, or, backward, taken from there."""
    places = places.long()
    move = lambda v: torch.empty_like(v).index_copy_(0, places, v) if is_forward else v[places]
    return move(x), None if probs is None else move(probs)


ANSWERS = [
    *(make_row_id_map, permute_with_mask_map, unpermute_with_mask_map, unpermute_with_mask_map_bwd_with_merging_probs),
    *(make_chunk_sort_map, sort_chunks_by_map),
]
