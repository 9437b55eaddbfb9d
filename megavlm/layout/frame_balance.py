"""Which rank encodes which frame, and which rank needs which visual token.

A frame is one temporal step of a picture or video. Attention in the tower never crosses frames, so they can be
distributed freely. Every rank computes the same results on the host, from the sizes and positions of the frames, so
the ranks need not communicate.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megavlm.layout.row_cut import RowCut
from megavlm.platform import to_device


def frame_cost(num_patches: np.ndarray, linear_cost: float) -> np.ndarray:
    """The cost of frames of n patches, ``linear_cost * n + n²``, float64 [F], in units of one query-key pair.

    ``linear_cost``: the cost of the matrix products of one patch.
    """
    return linear_cost * num_patches + num_patches.astype(np.float64) ** 2


def balance_frames(num_patches: np.ndarray, ranks: int, linear_cost: float) -> np.ndarray:
    """The rank that encodes each frame, int64 [F]. Frames go in order of falling cost to the least loaded rank.

    Args:
        num_patches: int [F], number of patches of each frame.
        ranks: number of ranks over which the frames are distributed.
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
class RankShare:
    """Which features one rank of the group that shares the frames needs.

    Attributes:
        context, context_index: number of parts into which context parallelism cuts a row; index of this rank's part.
        slices, slice_index: number of slices into which sequence parallelism cuts that part; index of this rank's.
        planes: feature planes that this rank uses: 0 is the embeddings (first stage), 1 + k is deepstack level k.
        gives_gradient: false if another rank has the same gradient (tensor ranks without sequence parallelism).
        dp_rank: data-parallel rank whose rows it works on, counted within the group.
    """

    context: int = 1
    context_index: int = 0
    slices: int = 1
    slice_index: int = 0
    planes: tuple[int, ...] = ()
    gives_gradient: bool = True
    dp_rank: int = 0

    @property
    def cell(self) -> int:
        """The index of this rank's slice of a row, counted over all data-parallel ranks, context parts and slices."""
        return (self.dp_rank * self.context + self.context_index) * self.slices + self.slice_index


@dataclass(frozen=True)
class VisualRow:
    """What all ranks that share the frames must know about a row.

    A frame is used once or, by samples that share their pictures, several times. Its tokens are contiguous in the row.

    Attributes:
        segment_lengths: number of tokens of each segment.
        frame_tokens: int64 [F], number of visual tokens of each frame.
        frame_images: int64 [F], number of images of each frame: 1 for a picture, more for a step of a video.
        use_frames, use_starts: int64 [U], in the order of the row: the frame, and the position of its first token.
    """

    segment_lengths: list[int]
    frame_tokens: np.ndarray
    frame_images: np.ndarray
    use_frames: np.ndarray
    use_starts: np.ndarray


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a window of micro-batches and their destinations.

    Attributes:
        frame: int64 [N], the frame of each token, numbered in the order in which the frames were distributed.
        within: int64 [N], the token's index within the frame.
        cell: int64 [N], the ``RankShare.cell`` that needs it.
        position: int64 [N], its position in that slice.
        micro_batch: int64 [N], the index of its micro-batch in the window of its data-parallel rank.
    """

    frame: np.ndarray
    within: np.ndarray
    cell: np.ndarray
    position: np.ndarray
    micro_batch: np.ndarray

    @classmethod
    def of(cls, rows: Sequence["VisualRow"], share: RankShare, dp_rank: int) -> "VisualTokens":
        """The tokens of the window of one data-parallel rank. ``share``: that of any rank, since all cut rows alike."""
        nothing = np.empty(0, np.int64)
        frames, withins, cells, positions, sizes, num_frames = [], [], [], [], [], 0
        for row in rows:
            counts = row.frame_tokens[row.use_frames]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            at = np.repeat(row.use_starts, counts) + within
            frames.append(np.repeat(row.use_frames + num_frames, counts))
            withins.append(within)
            num_frames += len(row.frame_tokens)
            cut = RowCut.of(row.segment_lengths, share.context)
            slice_index, position = np.divmod(cut.local[at], cut.order.shape[1] // share.slices)
            cells.append((dp_rank * share.context + cut.owner[at]) * share.slices + slice_index)
            positions.append(position)
            sizes.append(len(at))
        return cls(
            frame=np.concatenate([*frames, nothing]),
            within=np.concatenate([*withins, nothing]),
            cell=np.concatenate([*cells, nothing]),
            position=np.concatenate([*positions, nothing]),
            micro_batch=np.repeat(np.arange(len(rows)), sizes),
        )

    @classmethod
    def join(cls, parts: Sequence["VisualTokens"], num_frames: Sequence[int]) -> "VisualTokens":
        """Joins the tokens of several data-parallel ranks. ``num_frames``: the number of frames of each."""
        starts = np.cumsum([0, *num_frames[:-1]])
        return cls(
            frame=np.concatenate([part.frame + start for part, start in zip(parts, starts, strict=True)]),
            within=np.concatenate([part.within for part in parts]),
            cell=np.concatenate([part.cell for part in parts]),
            position=np.concatenate([part.position for part in parts]),
            micro_batch=np.concatenate([part.micro_batch for part in parts]),
        )


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one window of micro-batches on one rank. Its unit is one plane of one visual token.

    Attributes:
        num_own: number of tokens N_own of the frames that this rank encodes.
        send: int64 [S], indices into [planes of the model * N_own] of the units to send, ordered by destination.
        send_counts: number of units for each destination.
        receive_counts: number of units from each source; received units are ordered by source.
        take: for each micro-batch, int64 [planes of this rank, n], indices into the received units.
        positions: for each micro-batch, int64 [n], positions of those tokens in this rank's slice of the row.
    """

    num_own: int
    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    take: list[Tensor]
    positions: list[Tensor]

    def to(self, device: torch.device) -> "Exchange":
        """A copy with the indices on ``device``. The copy does not wait for the device."""
        send, *others = (to_device(x, device) for x in (self.send, *self.take, *self.positions))
        return replace(self, send=send, take=others[: len(self.take)], positions=others[len(self.take) :])


def plan_exchange(
    tokens: VisualTokens,
    frame_tokens: np.ndarray,
    owner: np.ndarray,
    shares: Sequence[RankShare],
    rank: int,
    num_rows: int,
) -> Exchange:
    """Plans the exchange for ``rank``. Time and memory are proportional to the tokens, not to the size of the group.

    Args:
        tokens: the visual tokens of all ranks of the group.
        frame_tokens, owner: int64 [F], number of visual tokens of each frame, and the rank that encodes it.
        shares: what each rank of the group needs.
        rank: this rank's index in the group.
        num_rows: number of micro-batches in this rank's window.
    """
    token_owner = owner[tokens.frame]
    own_tokens = np.where(owner == rank, frame_tokens, 0)
    num_own = int(own_tokens.sum())
    first_own = np.cumsum(own_tokens) - own_tokens  # this rank encodes its frames in ascending order
    own = np.flatnonzero(token_owner == rank)
    own = own[np.argsort(tokens.cell[own], kind="stable")]
    encoded = first_own[tokens.frame[own]] + tokens.within[own]
    cells = tokens.cell[own]
    nothing = np.empty(0, np.int64)
    send = []
    for share in shares:
        first, last = np.searchsorted(cells, (share.cell, share.cell + 1))
        planes = np.array(share.planes, dtype=np.int64)
        send.append((planes[:, None] * num_own + encoded[None, first:last]).ravel())

    here = shares[rank]
    needed = np.flatnonzero(tokens.cell == here.cell) if here.planes else nothing
    needed = needed[np.argsort(token_owner[needed], kind="stable")]
    source = token_owner[needed]
    counts = np.bincount(source, minlength=len(shares))
    starts = np.cumsum(counts) - counts
    plane = np.arange(len(here.planes))[:, None]
    # what comes from one source is [planes, its tokens]
    place_of = len(here.planes) * starts[source] + plane * counts[source] + (np.arange(len(needed)) - starts[source])
    row_of = tokens.micro_batch[needed]
    rows = [np.flatnonzero(row_of == row) for row in range(num_rows)]
    return Exchange(
        num_own=num_own,
        send=torch.from_numpy(np.concatenate(send)),
        send_counts=[len(part) for part in send],
        receive_counts=(len(here.planes) * counts).tolist(),
        take=[torch.from_numpy(place_of[:, at]) for at in rows],
        positions=[torch.from_numpy(tokens.position[needed[at]]) for at in rows],
    )
