"""What a frozen vision tower has computed of the frames of one step of reinforcement learning, for all passes of it.

Sampling, the reference and the updates see the same pictures several times. While no weight of the tower is trained,
each frame goes through the tower once: its hidden states stay, in host memory, on the rank that has computed them, and
that rank gives them again whenever the frame returns. They are kept as they are before the projector, which may
therefore be trained. A frame is known by its pixels, so it does not matter which prompt, answer or row has it.

Nothing is kept outside ``keeping``, nor as soon as a weight of the tower is trained. What is kept is copied to the host
and back on the device's stream; only there is it in order, so the host itself must never read it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from megavlm.data.row import Row
from megavlm.layout.frame_balance import balance_frames
from megavlm.model.vision import Frames, VisionTower
from megavlm.model.vlm import VLM
from megavlm.platform import device, host_buffer
from megavlm.platform.collectives import all_gather_objects, broadcast_object

MOST_BYTES = 8 * 2**30
"""Of the hidden states that a rank keeps. Further frames go through the tower each time."""


@dataclass
class KeptFrames:
    """The hidden states of frames by their keys, each [taps + 1, patches of the frame, hidden] in host memory."""

    states: dict[bytes, Tensor]
    used_bytes: int = 0

    def put(self, keys: Sequence[bytes], lengths: Sequence[int], hidden: Sequence[Tensor]) -> list[Tensor | None]:
        """Keeps what the tower has computed of frames, as far as there is room.

        Args:
            keys, lengths: of each frame, its key and its number of patches.
            hidden: the tower's outputs for all of them, each [patches, hidden].

        Returns:
            For each frame what is kept of it; None: nothing.
        """
        size = len(hidden) * hidden[0].numel() * hidden[0].element_size()
        if self.used_bytes + size > MOST_BYTES:
            return [None] * len(keys)
        self.used_bytes += size
        patches, width = hidden[0].shape
        buffer = host_buffer(len(hidden) * patches, width, hidden[0].dtype).view(len(hidden), patches, width)
        for plane, states in zip(buffer, hidden, strict=True):
            plane.copy_(states.detach(), non_blocking=True)
        kept = buffer.split(list(lengths), dim=1)
        self.states.update(zip(keys, kept, strict=True))
        return list(kept)


_OF_TOWER: WeakKeyDictionary[VisionTower, KeptFrames] = WeakKeyDictionary()  # those that keep now


@contextmanager
def keeping(vlm: VLM) -> Iterator[None]:
    """Within the block, what the frozen tower of ``vlm`` computes of rows with keys is kept and used; then it is freed.

    If the tower is trained, nothing is kept.
    """
    _OF_TOWER[vlm.vision] = KeptFrames({})
    try:
        yield
    finally:
        _OF_TOWER.pop(vlm.vision).states.clear()


@contextmanager
def sharing_kept(vlm: VLM, main: VLM) -> Iterator[None]:
    """Within the block, ``vlm`` uses what ``main`` keeps, if all weights of its tower are those of ``main``'s."""
    kept = _OF_TOWER.get(main.vision)
    mine, others = list(vlm.vision.named_parameters()), list(main.vision.named_parameters())
    is_same = len(mine) == len(others) and all(
        name == other_name and weight.data_ptr() == other.data_ptr() and weight.data_ptr()
        for (name, weight), (other_name, other) in zip(mine, others, strict=True)
    )
    if kept is None or not is_same:
        yield
        return
    _OF_TOWER[vlm.vision] = kept
    try:
        yield
    finally:
        del _OF_TOWER[vlm.vision]


def can_keep(vlm: VLM) -> bool:
    """Whether what the tower computes is kept now: within ``keeping``, unless a weight of the tower is trained."""
    return vlm.vision in _OF_TOWER and not any(weight.requires_grad for weight in vlm.vision.parameters())


def num_kept(vlm: VLM) -> int:
    """The number of frames that are kept on this rank."""
    return len(_OF_TOWER[vlm.vision].states) if vlm.vision in _OF_TOWER else 0


def frame_keys(vlm: VLM, hosts: Sequence[Row], full: Sequence[Row | None]) -> list[list[bytes]] | None:
    """The keys of the frames of each row, on every rank; None if nothing is kept. Call it on all ranks of the group.

    Args:
        vlm: the model, or its view for sampling.
        hosts: the rows, on every rank of the model-parallel group.
        full: the rows with their pixels, on the leader.
    """
    if not can_keep(vlm):
        return None
    if not any(len(row.frame_grids) for row in hosts):
        return [[] for _ in hosts]
    keys = [_keys(row) for row in full if row is not None] if vlm.groups.is_leader else []
    return broadcast_object(keys, vlm.groups.model_parallel_host)


def _keys(row: Row) -> list[bytes]:
    """A frame's key is made of its pixels and its size, on which alone depends what the tower computes of it."""
    pixels = row.pixels.contiguous().numpy()
    counts = (row.frame_grids.prod(dim=1) * row.frame_images).tolist()
    keys, start = [], 0
    for count, grid, images in zip(counts, row.frame_grids.tolist(), row.frame_images.tolist(), strict=True):
        key = hashlib.blake2b(repr((grid, images)).encode(), digest_size=16)
        key.update(pixels[start : start + count])
        keys.append(key.digest())
        start += count
    return keys


@dataclass(frozen=True)
class Recall:
    """Which rank gives which frame of a window, and which of them have to be encoded.

    Attributes:
        kept: what this rank keeps.
        keys: the key of each frame, over all data-parallel ranks that share them.
        lengths: int64 [F], patches of each frame.
        owner: int64 [F], the rank of the tower's group that gives it.
        sent_to: int64 [F], the same for a frame that must be encoded, which needs its pixels there; -1 for the others.
        rank: this rank's number in the group.
    """

    kept: KeptFrames
    keys: list[bytes]
    lengths: np.ndarray
    owner: np.ndarray
    sent_to: np.ndarray
    rank: int

    @classmethod
    def of(cls, vlm: VLM, keys: list[bytes], lengths: np.ndarray) -> "Recall":
        """Asks all ranks of the tower's group which frames they have. New frames are distributed as always."""
        kept, group = _OF_TOWER[vlm.vision], vlm.tower.group
        owner = np.full(len(keys), -1, dtype=np.int64)
        for rank, has in _of_all_ranks(vlm, [key in kept.states for key in keys]) if keys else []:
            owner[(owner < 0) & np.asarray(has, dtype=bool)] = rank
        is_new = owner < 0
        owner[is_new] = balance_frames(lengths[is_new], group.size(), vlm.linear_cost)
        return cls(kept, keys, lengths, owner, np.where(is_new, owner, -1), group.rank())

    def complete(self, new: Frames) -> "RecalledFrames":
        """All frames that this rank gives, in order. ``new``: those of them that must be encoded."""
        mine = np.flatnonzero(self.owner == self.rank).tolist()
        return RecalledFrames(
            new.patches, new.coords, new.pos_index, new.pos_weight, self.lengths[mine].tolist(),
            [self.keys[index] for index in mine],
            [self.kept.states[self.keys[index]] if self.sent_to[index] < 0 else None for index in mine],
            self.kept,
        )  # fmt: skip


@dataclass
class RecalledFrames(Frames):
    """Frames of which some have been through the tower. The patches are those of the others alone.

    Attributes:
        keys: the key of each frame.
        states: for each frame what is kept of it, [taps + 1, patches, hidden]; None: it must be encoded.
        kept: where further frames are kept.
    """

    keys: list[bytes]
    states: list[Tensor | None]
    kept: KeptFrames

    def slice(self, patches: slice, lengths: list[int]) -> Self:
        """See ``Frames``; ``patches`` counts those of all frames."""
        ends = np.cumsum([0, *self.lengths])
        first = int(np.searchsorted(ends, patches.start))
        new = np.cumsum([0, *(n if state is None else 0 for n, state in zip(self.lengths, self.states, strict=True))])
        frames = slice(first, first + len(lengths))
        part = super().slice(slice(int(new[frames.start]), int(new[frames.stop])), lengths)
        return replace(part, keys=self.keys[frames], states=self.states[frames])

    @property
    def num_new(self) -> int:
        """See ``Frames``."""
        return sum(state is None for state in self.states)

    def through(self, tower: VisionTower) -> list[Tensor]:
        """See ``Frames``. What the tower computes is kept, so that a further pass through it does not compute it."""
        at = [index for index, state in enumerate(self.states) if state is None]
        computed: dict[int, Tensor] = {}
        if at:
            lengths = [self.lengths[index] for index in at]
            hidden = tower(Frames(self.patches, self.coords, self.pos_index, self.pos_weight, lengths))
            for index, state in zip(at, self.kept.put([self.keys[n] for n in at], lengths, hidden), strict=True):
                self.states[index] = state
            if len(at) == len(self.lengths):
                return hidden
            computed = dict(zip(at, torch.stack(hidden).split(lengths, dim=1), strict=True))
        parts = [computed.get(index, state) for index, state in enumerate(self.states)]
        return _joined([part for part in parts if part is not None])


def _joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """Planes of frames, each [planes, patches, hidden] in host memory or on the device, end to end on the device.

    They are copied plane by plane: these are contiguous, and of what is not the host would make a copy.
    """
    planes, _, width = parts[0].shape
    joined = parts[0].new_empty(planes, sum(part.shape[1] for part in parts), width, device=device())
    start = 0
    for part in parts:
        end = start + part.shape[1]
        for plane, states in zip(joined, part, strict=True):
            plane[start:end].copy_(states, non_blocking=True)
        start = end
    return list(joined.unbind())


def _of_all_ranks[T](vlm: VLM, value: T) -> list[tuple[int, T]]:
    """The ``value`` of each rank of the tower's group, with its number in the group."""
    groups, sharing = vlm.groups, vlm.sharing
    host = groups.model_parallel_host
    of_group = all_gather_objects(value, host) if host.size() > 1 else [value]
    if sharing is None:
        return list(enumerate(of_group))
    of_all = all_gather_objects(of_group, sharing.peers_host)
    return [
        pair for ranks, values in zip(sharing.members, of_all, strict=True) for pair in zip(ranks, values, strict=True)
    ]
