"""Attention while answers are sampled: prompts attend to themselves, new tokens to their prompt and their own answer.

The keys of a prompt are stored once. All answers to it attend to them in one call, in which their tokens are the
queries; a second call attends to what each answer has added. The log-sum-exps of both weigh the two results. The number
of calls does not depend on the number of sequences.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.model.kernels.attention import segment_attention
from megavlm.model.packed import PackedRow
from megavlm.platform import device, to_device
from megavlm.platform.batch_invariant import attend_one, is_batch_invariant
from megavlm.rollout.blocks import KeyValuePool


class Spans:
    """Sequences of stored tokens, and how many queries attend to each.

    Args:
        slots: for each sequence the slots of its tokens; at least one.
        queries: for each sequence the number of queries. The queries of the first sequence come first, and so on.
    """

    def __init__(self, slots: Sequence[np.ndarray], queries: Sequence[int]) -> None:
        self.slots = slots
        self._lengths, self.queries = [len(part) for part in slots], queries
        self._index: tuple[Tensor, ...] | None = None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attends to all tokens of the sequences.

        Args:
            query: [n, heads, head_dim].
            keys, values: [kv_heads, slots, head_dim].
            scale: factor on the products of queries and keys.

        Returns:
            The output float32 [n, heads, head_dim], and the log-sum-exp of the products, float32 [n, heads].
        """
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._fused(query, keys, values, scale)
        return self._padded(query, keys, values, scale)

    def _fused(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        if self._index is None:  # it is the same in all layers
            ends = lambda lengths: torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            host = torch.from_numpy(np.concatenate(self.slots)), ends(self.queries), ends(self._lengths)
            self._index = tuple(to_device(part, query.device) for part in host)
        slots, query_ends, key_ends = self._index
        key, value = (pool.index_select(1, slots).transpose(0, 1).contiguous() for pool in (keys, values))
        out, log_sum = varlen_attn(
            query.contiguous(), key, value, query_ends, key_ends, max(self.queries), max(self._lengths),
            return_aux=AuxRequest(lse=True), scale=scale,
        )  # fmt: skip
        return out.float(), log_sum.t()  # the kernel returns [heads, n]

    def _padded(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self._index is None:
            host = (
                _stacked(self.slots), _stacked([np.ones(n, np.int64) for n in self._lengths]) == 0,
                *_places(self.queries),
            )  # fmt: skip
            self._index = tuple(to_device(torch.from_numpy(part), query.device) for part in host)
        slots, unused, place, back = self._index
        (sequences, longest), most, dim = slots.shape, place.shape[1], query.shape[2]
        kv_heads, heads = keys.shape[0], query.shape[1]
        flat = slots.flatten()
        gathered = [p.index_select(1, flat).view(kv_heads, sequences, longest, dim).float() for p in (keys, values)]
        # [n, heads, dim] -> [kv_heads, sequences, queries × heads of a kv head, dim]
        grouped = query[place].view(sequences, most, kv_heads, -1, dim).permute(2, 0, 1, 3, 4)
        products = grouped.reshape(kv_heads, sequences, -1, dim).float() @ gathered[0].transpose(-1, -2)
        products = products.mul_(scale).masked_fill_(unused[:, None], float("-inf"))
        log_sum = products.logsumexp(-1, keepdim=True)
        out = products.sub_(log_sum).exp_() @ gathered[1]

        def ungrouped(x: Tensor) -> Tensor:
            x = x.view(kv_heads, sequences, most, -1, x.shape[-1]).permute(1, 2, 0, 3, 4)
            return x.reshape(sequences * most, heads, -1)[back]

        return ungrouped(out), ungrouped(log_sum).squeeze(-1)


class StepAttention:
    """The ``Cache`` of one row: whole prompts first, then one token of each answer that goes on, then padding.

    Args:
        pool: the memory.
        prompts: the slots of each new prompt.
        shared: the prompts of the answers, with the number of answers to each.
        own: what each answer has added to its prompt, the new token included; one query each.

    Attributes:
        slots: int64 [n], the slot of each token of the row that is not padding.
    """

    def __init__(self, pool: KeyValuePool, prompts: Sequence[np.ndarray], shared: Spans, own: Spans) -> None:
        self._pool, self._shared, self._own = pool, shared, own
        lengths = [len(slots) for slots in prompts]
        self._prompt_tokens, self._used = sum(lengths), sum(lengths) + len(own.slots)
        self._row = PackedRow.of(lengths, device())
        new = np.concatenate([np.empty(0, np.int64), *prompts, *(slots[-1:] for slots in own.slots)])
        self.slots = to_device(torch.from_numpy(new), device())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float) -> Tensor:
        """Stores keys and values [T, kv_heads, dim] and computes attention: [T, heads, dim] -> the same shape."""
        if not self._used:  # a row of padding
            return torch.zeros_like(query)
        first, used = self._prompt_tokens, self._used
        keys, values = self._pool.store(layer, key[:used], value[:used], self.slots)
        out = torch.zeros_like(query)
        if first:
            out[:first] = segment_attention(
                query[:first], key[:first], value[:first], self._row, causal=True, scale=scale
            )
        if used > first:
            decode = self._decode_one_by_one if is_batch_invariant() else self._decode
            out[first:used] = decode(query[first:used], keys, values, scale).to(out.dtype)
        return out

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        of_prompt, prompt_sum = self._shared.attend(query, keys, values, scale)
        of_answer, answer_sum = self._own.attend(query, keys, values, scale)
        both = torch.logaddexp(prompt_sum, answer_sum)
        return of_prompt * (prompt_sum - both).exp()[..., None] + of_answer * (answer_sum - both).exp()[..., None]

    def _decode_one_by_one(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        prompts = np.repeat(np.arange(len(self._shared.slots)), self._shared.queries).tolist()
        out = []
        for one, prompt, own in zip(query, prompts, self._own.slots, strict=True):
            slots = to_device(torch.from_numpy(np.concatenate([self._shared.slots[prompt], own])), query.device)
            out.append(attend_one(one, keys[:, slots].transpose(0, 1), values[:, slots].transpose(0, 1), scale))
        return torch.stack(out)


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays as rows of a matrix, filled up with zeros."""
    out = np.zeros((len(parts), max(map(len, parts))), np.int64)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def _places(queries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The indices of each sequence's queries, filled up with zeros; where each query is in that matrix, flattened."""
    starts = np.cumsum([0, *queries])
    place = _stacked([np.arange(a, b) for a, b in itertools.pairwise(starts.tolist())])
    back = [row * place.shape[1] + np.arange(count) for row, count in enumerate(queries)]
    return place, np.concatenate(back)
