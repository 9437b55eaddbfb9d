"""Who encodes which frame, and which rank needs which visual token: host arithmetic, the same on every rank.

A frame is one temporal step of a picture or video; attention in the tower never crosses one, so frames can be dealt
freely. Everything here is computed from the frames' sizes and places alone, so no rank has to ask another.
"""

import heapq
from dataclasses import dataclass

import numpy as np


def deal_frames(num_patches: np.ndarray, ranks: int, linear_cost: float) -> np.ndarray:
    """Owner of each frame, int64 [F]: longest first, each to the least loaded rank.

    Args:
        num_patches: int [F].
        ranks: size of the model-parallel group.
        linear_cost: cost of a patch's matrix products in units of one query-key pair of attention; a frame of n patches
            costs ``linear_cost * n + n²``.
    """
    cost = linear_cost * num_patches + num_patches.astype(np.float64) ** 2
    owner = np.zeros(len(num_patches), dtype=np.int64)
    load = [(0.0, rank) for rank in range(ranks)]
    for frame in np.argsort(-cost, kind="stable"):
        total, rank = heapq.heappop(load)
        owner[frame] = rank
        heapq.heappush(load, (total + cost[frame], rank))
    return owner


@dataclass(frozen=True)
class Place:
    """What one rank of the model-parallel group needs of the features.

    Attributes:
        slices, slice_index: the row is cut into so many equal parts by sequence parallelism; which this rank holds.
        planes: feature planes used on this rank: 0 embeds (first stage), 1 + k is deepstack level k.
        gives_gradient: false where another rank holds the same gradient (tensor ranks without sequence parallelism).
    """

    slices: int
    slice_index: int
    planes: tuple[int, ...]
    gives_gradient: bool = True


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one window of micro-batches, as seen by one rank.

    Attributes:
        frames: indices of the frames this rank encodes, ascending; their tokens in this order are its ``N_own``.
        send: per destination, int64 indices into ``N_own``.
        counts: per source, number of tokens received from it.
        rows: per micro-batch, int64 indices into the received tokens (sources one after the other).
        positions: per micro-batch, int64 positions of those tokens in this rank's slice of the row.
    """

    frames: np.ndarray
    send: list[np.ndarray]
    counts: list[int]
    rows: list[np.ndarray]
    positions: list[np.ndarray]


def plan_exchange(
    frame_tokens: list[np.ndarray],
    token_positions: list[np.ndarray],
    row_length: int,
    owner: np.ndarray,
    places: list[Place],
    rank: int,
) -> Exchange:
    """Plans the exchange for ``rank``.

    Args:
        frame_tokens: per micro-batch, visual tokens of each of its frames, int [F_m].
        token_positions: per micro-batch, row position of each visual token, int64 [N_m], frames in the same order.
        row_length: T.
        owner: owner of each frame of the window, micro-batch after micro-batch.
        places: what each rank of the group needs.
    """
    micro_batch = np.repeat(np.arange(len(token_positions)), [len(p) for p in token_positions])  # [N]
    position = np.concatenate([*token_positions, np.empty(0, np.int64)]).astype(np.int64)
    tokens_of_frame = np.concatenate([*frame_tokens, np.empty(0, np.int64)]).astype(np.int64)
    token_owner = np.repeat(owner, tokens_of_frame)
    # a token's index among those of its owner
    own_index = np.zeros(len(position), dtype=np.int64)
    for r in range(len(places)):
        mine = token_owner == r
        own_index[mine] = np.arange(mine.sum())

    def needed_by(place: Place) -> np.ndarray:
        if not place.planes:
            return np.zeros(len(position), dtype=bool)
        return position // (row_length // place.slices) == place.slice_index

    send = [own_index[needed_by(place) & (token_owner == rank)] for place in places]
    here = places[rank]
    needed = needed_by(here)
    sources = [np.flatnonzero(needed & (token_owner == r)) for r in range(len(places))]
    received = np.concatenate(sources)
    rows, positions = [], []
    start = here.slice_index * (row_length // here.slices)
    for m in range(len(token_positions)):
        at = np.flatnonzero(micro_batch[received] == m)
        rows.append(at)
        positions.append(position[received[at]] - start)
    return Exchange(np.flatnonzero(owner == rank), send, [len(s) for s in sources], rows, positions)
