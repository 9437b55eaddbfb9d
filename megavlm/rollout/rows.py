"""Makes the rows of sampling: whole new prompts, then the newest token of each answer that goes on, then padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megavlm.data.row import pack, padded_length
from megavlm.model.packed import PackedRow
from megavlm.model.vlm import VLM
from megavlm.platform import device, to_device
from megavlm.rollout.answers import Growing, OpenPrompt
from megavlm.rollout.attention import Spans, StepAttention
from megavlm.rollout.blocks import KeyValuePool
from megavlm.rollout.routing_pool import RoutingPool
from megavlm.rollout.timing import Timer
from megavlm.runtime.feed import Feed, MicroBatch
from megavlm.runtime.forward import encode_window
from megavlm.runtime.kept_frames import frame_keys


@dataclass
class Operation:
    """One pass of a row through the decoder.

    Attributes:
        input_ids, position_ids, row: arguments of ``LanguageModel.forward``.
        width: number of tokens of the row.
        micro_batch: the new prompts with the features of their frames; None: there are none.
        draws: the answers that get a token.
        positions: int64 [draws], the tokens of the row after which they get it.
        drawn: on the last stage, float64 [4, draws] on the host: tokens and their three log-probabilities.
    """

    input_ids: Tensor
    position_ids: Tensor
    row: PackedRow
    width: int
    micro_batch: MicroBatch | None
    draws: list[tuple[OpenPrompt, Growing]]
    positions: Tensor
    drawn: Tensor | None = None


class RowMaker:
    """Makes the rows of one run on all ranks of a sampling group.

    Args:
        view: the model, see ``sampling_view``.
        pool: the memory for keys and values.
        timer: makes a context manager around the part of the work that its argument names.
        routing: records the experts of tokens; None: nothing does.
    """

    def __init__(self, view: VLM, pool: KeyValuePool, timer: Timer, routing: RoutingPool | None) -> None:
        self._view, self._pool, self._timer, self._routing = view, pool, timer, routing
        self.slices = view.parallel.tensor if view.parallel.sequence_parallel else 1

    def padding(self) -> Operation:
        """A row of padding, for a rank that computes only because the experts of other ranks' tokens are on it."""
        return self._operation([], [], self.slices)

    def make(self, new: Sequence[OpenPrompt], growing: Sequence[tuple[OpenPrompt, Growing]]) -> Operation | None:
        """Makes a row. Call it on all ranks; it encodes the frames of new prompts.

        Args:
            new: prompts that start.
            growing: answers with places. Those without a token, which belong to new prompts, have no part in the row.

        Returns:
            The row; None if it would be empty.
        """
        order = {asked: number for number, (asked, _) in enumerate(reversed(growing))}
        going = sorted((pair for pair in growing if pair[1].tokens), key=lambda pair: -order[pair[0]])
        used = sum(asked.length for asked in new) + len(going)
        return self._operation(new, going, padded_length(used, self.slices)) if used else None

    def _operation(
        self, new: Sequence[OpenPrompt], going: Sequence[tuple[OpenPrompt, Growing]], width: int
    ) -> Operation:
        groups = [(asked, [answer for _, answer in part]) for asked, part in groupby(going, key=lambda pair: pair[0])]
        shared = Spans([asked.slots for asked, _ in groups], [len(answers) for _, answers in groups])
        own = Spans([_own_slots(answer) for _, answer in going], [1] * len(going))
        cache = StepAttention(self._pool, [asked.slots for asked in new], shared, own)
        first = sum(asked.length for asked in new)
        tokens = torch.tensor([answer.tokens[-1] for _, answer in going], dtype=torch.int64)
        positions = torch.tensor([a.next_position + len(answer.tokens) - 1 for a, answer in going], dtype=torch.int64)
        micro_batch = self._encoded(new, width) if new else None
        if micro_batch is None:
            row = PackedRow.of([width], device())
            input_ids, position_ids = torch.zeros(width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
            input_ids[: len(going)], position_ids[:, : len(going)] = tokens, positions
            input_ids, position_ids = to_device(input_ids, device()), to_device(position_ids, device())
        else:
            row, input_ids, position_ids = micro_batch.row, micro_batch.input_ids, micro_batch.position_ids
            here = slice(first, first + len(going))
            input_ids[here], position_ids[:, here] = to_device(tokens, device()), to_device(positions, device())
        row.cache = cache
        row.routing = self._routing.recorder(cache.slots, width) if self._routing is not None else None
        ends = np.cumsum([asked.length for asked in new], dtype=np.int64) - 1
        where = [int(end) for asked, end in zip(new, ends, strict=True) for _ in asked.answers]
        where += range(first, first + len(going))
        return Operation(
            input_ids, position_ids, row, width, micro_batch,
            draws=[*((asked, answer) for asked in new for answer in asked.answers), *going],
            positions=to_device(torch.tensor(where, dtype=torch.int64), device()),
        )  # fmt: skip

    def _encoded(self, new: Sequence[OpenPrompt], width: int) -> MicroBatch:
        """The new prompts as the beginning of a row of ``width`` tokens, with the features of their frames."""
        view, packed = self._view, None
        if view.groups.is_leader:
            vision = view.shapes.vision
            samples = [asked.prompt.sample for asked in new if asked.prompt is not None]
            row = pack(samples, width, pad_id=0, grid_side=vision.grid_side, merge=vision.spatial_merge_size)
            packed = iter([row])
        feed = Feed(view, packed)
        rows = feed.rows(1)
        assert rows is not None, "the leader has a row"
        rows.keys = frame_keys(view, rows.hosts, rows.full)
        window = next(feed.windows(rows, 1))
        with self._timer("tower"):
            encode_window(view, window)
        return window.micro_batches[0]


def _own_slots(answer: Growing) -> np.ndarray:
    """The slots of all tokens so far; the newest is stored in this pass."""
    assert answer.slots is not None, "only an answer with a place goes on"
    return answer.slots[: len(answer.tokens)]
