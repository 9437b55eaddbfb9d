"""Generates answers with the training model: a packed prefill, then one token per sequence and step with a cache.

The layout is the packed row: while decoding, a row contains one token of each sequence. Tensor and expert parallelism,
kernels and weights are therefore those of training, and nothing is converted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megavlm.model.kernels.attention import segment_attention
from megavlm.model.language import LanguageModel
from megavlm.model.packed import PackedRow


class KeyValueCache:
    """The keys and values of a batch of sequences, for all layers of this rank.

    Args:
        lengths: prompt lengths in tokens.
        room: maximum number of tokens to generate.
        device: device of the cache.
    """

    def __init__(self, lengths: list[int], room: int, device: torch.device) -> None:
        self.batch, self.longest = len(lengths), max(lengths) + room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths = torch.tensor(lengths, device=device)
        self._sequence = torch.repeat_interleave(torch.arange(self.batch, device=device), self._lengths)
        self._place = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.filled, self.filling = max(lengths), True  # filled: length of the longest sequence so far, on the host

    def next_token(self) -> None:
        """Must be called before each forward pass of one token per sequence."""
        if self.filling:
            self._sequence, self._place = torch.arange(self.batch, device=self._lengths.device), self._lengths
        else:
            self._place = self._place + 1
        self.filling = False
        self.filled += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float) -> Tensor:
        """Stores the new keys and values [T, kv_heads, dim] and computes attention: [T, heads, dim] -> same shape.

        Tokens of the row after those of the sequences are padding, and their outputs are meaningless.
        """
        if layer not in self._layers:
            empty = key.new_zeros(self.batch, self.longest, *key.shape[1:])
            self._layers[layer] = (empty, torch.zeros_like(empty))
        keys, values = self._layers[layer]
        used = len(self._sequence)
        keys[self._sequence, self._place] = key[:used]
        values[self._sequence, self._place] = value[:used]
        if self.filling:
            return segment_attention(query, key, value, row, causal=True, scale=scale)
        seen = torch.arange(self.filled, device=query.device) <= self._place[:, None]  # [batch, filled]
        out = F.scaled_dot_product_attention(
            query[:used, :, None],
            keys[:, : self.filled].transpose(1, 2),
            values[:, : self.filled].transpose(1, 2),
            attn_mask=seen[:, None, None],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return F.pad(out.squeeze(2), (0, 0, 0, 0, 0, query.shape[0] - used))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 takes the most likely one; ``banned`` tokens are never chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[int] = ()
    banned: Sequence[int] = ()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Chooses the next tokens, int64 [batch], from logits, float32 [batch, vocabulary]."""
    if sampling.banned:
        logits = logits.index_fill(1, torch.tensor(list(sampling.banned), device=logits.device), float("-inf"))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits / sampling.temperature).sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    # a token is kept if the sum of those before it is less than top_p; the first is always kept
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: list[int],
    visual: tuple[Tensor, Tensor, Tensor | None],
    sampling: Sampling,
    *,
    tensor_slices: int,
    generator: torch.Generator | None = None,
    all_finished: Callable[[Tensor], bool] = lambda finished: bool(finished.all()),
) -> list[list[int]]:
    """Generates an answer to each prompt of a packed row.

    Args:
        model: the whole decoder (one pipeline stage), in eval mode.
        input_ids: int64 [T], the prompts end to end, followed by padding to a multiple of ``tensor_slices``.
        position_ids: int64 [3, T].
        lengths: number of tokens of each prompt, as host integers.
        visual: (positions [N] in this rank's slice, embeddings [N, hidden], deepstack [levels, N, hidden] or None).
        sampling: how tokens are chosen and when to stop.
        tensor_slices: number of slices into which sequence parallelism cuts a row; 1 without it.
        generator: random generator for sampling, with the same state on all tensor ranks.
        all_finished: whether to stop, given bool [batch]; with expert parallelism all ranks must stop together.

    Returns:
        The token ids of each answer, without the stop token.
    """
    device = input_ids.device
    cache = KeyValueCache(lengths, sampling.max_new_tokens, device)
    positions, embeddings, deepstack = visual
    padding = len(input_ids) - sum(lengths)
    row = PackedRow.of([*lengths, padding] if padding else lengths, device, visual_positions=positions, cache=cache)
    hidden = model(input_ids, position_ids, row, visual=embeddings, deepstack=deepstack)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    # the three positions of a new token are one more than the largest position before it
    top = torch.stack([part.max() for part in position_ids[:, : sum(lengths)].split(lengths, dim=1)])
    stop = torch.tensor(list(sampling.stop), device=device)
    finished = torch.zeros(len(lengths), dtype=torch.bool, device=device)
    batch, answers = len(lengths), []
    width = -(-batch // tensor_slices) * tensor_slices
    where = ends
    for step in range(sampling.max_new_tokens):
        tokens = choose(model.logits(hidden, where), sampling, generator)
        finished = finished | torch.isin(tokens, stop)
        answers.append(torch.where(finished, -1, tokens))
        if step + 1 == sampling.max_new_tokens or all_finished(finished):
            break
        cache.next_token()
        row = PackedRow.of([1] * width, device, visual_positions=positions[:0], cache=cache)
        next_ids = F.pad(tokens, (0, width - batch))
        next_positions = F.pad(top + 1 + step, (0, width - batch)).expand(3, -1)
        hidden = model(next_ids, next_positions, row)
        where = torch.arange(batch, device=device)
    return [[token for token in answer if token >= 0] for answer in torch.stack(answers, 1).tolist()]
