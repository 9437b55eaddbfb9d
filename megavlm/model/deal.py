"""Who encodes which frame, and which rank needs which visual token: host arithmetic, the same on every rank.

A frame is one temporal step of a picture or video; attention in the tower never crosses one, so frames can be dealt
freely. Everything here is computed from the frames' sizes and places alone, so no rank has to ask another.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megavlm.model.row_cut import RowCut


def frame_cost(num_patches: np.ndarray, linear_cost: float) -> np.ndarray:
    """``linear_cost * n + n²`` for frames of n patches, float64 [F]: in units of one query-key pair of attention.

    ``linear_cost``: that of a patch's matrix products.
    """
    return linear_cost * num_patches + num_patches.astype(np.float64) ** 2


def deal_frames(num_patches: np.ndarray, ranks: int, linear_cost: float) -> np.ndarray:
    """Owner of each frame, int64 [F]: the costliest first, each to the least loaded rank.

    Args:
        num_patches: int [F].
        ranks: size of the group that shares the frames.
        linear_cost: see ``frame_cost``.
    """
    cost = frame_cost(num_patches, linear_cost)
    owner = np.zeros(len(num_patches), dtype=np.int64)
    load = [(0.0, rank) for rank in range(ranks)]
    for frame in np.argsort(-cost, kind="stable"):
        total, rank = heapq.heappop(load)
        owner[frame] = rank
        heapq.heappush(load, (total + cost[frame], rank))
    return owner


@dataclass(frozen=True)
class Place:
    """What one rank of the group that shares the frames needs of their features.

    Attributes:
        data_rank: whose rows it works on, counted within the group.
        context, context_index: parts in which context parallelism cuts a row; which this rank holds.
        slices, slice_index: equal slices of that part (sequence parallelism); which this rank holds.
        planes: feature planes used on this rank: 0 embeds (first stage), 1 + k is deepstack level k.
        gives_gradient: false where another rank holds the same gradient (tensor ranks without sequence parallelism).
    """

    context: int = 1
    context_index: int = 0
    slices: int = 1
    slice_index: int = 0
    planes: tuple[int, ...] = ()
    gives_gradient: bool = True
    data_rank: int = 0

    @property
    def cell(self) -> int:
        """Number of the slice of a row, over all data ranks, context parts and slices."""
        return (self.data_rank * self.context + self.context_index) * self.slices + self.slice_index

    def of_data_rank(self, data_rank: int) -> "Place":
        return replace(self, data_rank=data_rank)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a window of micro-batches and where they go; frames in the order in which they were dealt.

    Attributes:
        frame: int64 [N], the frame that each token belongs to, ascending.
        cell: int64 [N], the ``Place.cell`` that needs it.
        position: int64 [N], its position in that slice.
        micro_batch: int64 [N], which micro-batch of its data rank's window.
    """

    frame: np.ndarray
    cell: np.ndarray
    position: np.ndarray
    micro_batch: np.ndarray

    @classmethod
    def of(
        cls,
        frame_tokens: Sequence[np.ndarray],
        token_positions: Sequence[np.ndarray],
        cuts: Sequence[RowCut],
        place: Place,
    ) -> "VisualTokens":
        """The tokens of one data rank.

        Args:
            frame_tokens: per micro-batch, visual tokens of each of its frames, int [F_m].
            token_positions: per micro-batch, row position of each visual token, int64 [N_m], frames in the same order.
            cuts: how each row is cut.
            place: any place of this data rank.
        """
        counts = np.concatenate([*frame_tokens, np.empty(0, np.int64)]).astype(np.int64)
        cells, positions = [], []
        for at, cut in zip(token_positions, cuts, strict=True):
            length = cut.order.shape[1] // place.slices
            slice_index, position = np.divmod(cut.local[at], length)
            cells.append((place.data_rank * place.context + cut.owner[at]) * place.slices + slice_index)
            positions.append(position)
        return cls(
            frame=np.repeat(np.arange(len(counts)), counts),
            cell=np.concatenate([*cells, np.empty(0, np.int64)]),
            position=np.concatenate([*positions, np.empty(0, np.int64)]),
            micro_batch=np.repeat(np.arange(len(token_positions)), [len(at) for at in token_positions]),
        )

    @classmethod
    def join(cls, parts: Sequence["VisualTokens"], num_frames: Sequence[int]) -> "VisualTokens":
        """The tokens of several data ranks as one; ``num_frames`` counts the frames of each."""
        starts = np.cumsum([0, *num_frames[:-1]])
        return cls(
            frame=np.concatenate([part.frame + start for part, start in zip(parts, starts, strict=True)]),
            cell=np.concatenate([part.cell for part in parts]),
            position=np.concatenate([part.position for part in parts]),
            micro_batch=np.concatenate([part.micro_batch for part in parts]),
        )


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one window of micro-batches, as seen by one rank.

    Attributes:
        send: per destination, int64 indices into the tokens of the frames that this rank encodes, ``N_own``.
        counts: per source, number of tokens received from it.
        rows: per micro-batch, int64 indices into the received tokens (sources one after the other).
        positions: per micro-batch, int64 positions of those tokens in this rank's slice of the row.
    """

    send: list[np.ndarray]
    counts: list[int]
    rows: list[np.ndarray]
    positions: list[np.ndarray]


def plan_exchange(
    tokens: VisualTokens, owner: np.ndarray, places: Sequence[Place], rank: int, num_rows: int
) -> Exchange:
    """Plans the exchange for ``rank``; work and memory go with the tokens, whatever the size of the group.

    Args:
        owner: int64 [F], who encodes each frame.
        places: what each rank of the group needs.
        num_rows: micro-batches of this rank's window.
    """
    token_owner = owner[tokens.frame]
    own = np.flatnonzero(token_owner == rank)  # N_own, in the order in which this rank encodes them
    by_cell = np.argsort(tokens.cell[own], kind="stable")
    cells = tokens.cell[own][by_cell]
    nothing = np.empty(0, np.int64)
    send = []
    for place in places:
        first, last = np.searchsorted(cells, (place.cell, place.cell + 1)) if place.planes else (0, 0)
        send.append(by_cell[first:last] if last > first else nothing)

    here = places[rank]
    needed = np.flatnonzero(tokens.cell == here.cell) if here.planes else nothing
    received = needed[np.argsort(token_owner[needed], kind="stable")]
    row_of = tokens.micro_batch[received]
    rows = [np.flatnonzero(row_of == row) for row in range(num_rows)]
    return Exchange(
        send=send,
        counts=np.bincount(token_owner[needed], minlength=len(places)).tolist(),
        rows=rows,
        positions=[tokens.position[received[at]] for at in rows],
    )
