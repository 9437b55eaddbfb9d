"""Memory for keys and values: blocks of tokens, handed out on the host, in tensors that grow up to a budget."""

import heapq

import numpy as np
from torch import Tensor

BLOCK_TOKENS = 16
"""Number of tokens in a block. Small blocks waste little; larger ones would be faster only with a fused kernel."""


def blocks_for(tokens: int) -> int:
    """The number of blocks that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class Blocks:
    """Hands out blocks. All ranks of a model-parallel group hand out the same ones, since they do it in the same order.

    Args:
        count: number of blocks.
    """

    def __init__(self, count: int) -> None:
        self.count, self._given_up_to, self._free = count, 0, list[int]()  # a heap of blocks that were given back

    @property
    def free(self) -> int:
        """Number of blocks that are not in use."""
        return self.count - self._given_up_to + len(self._free)

    @property
    def touched(self) -> int:
        """Number of slots that were ever in use; only these need memory."""
        return self._given_up_to * BLOCK_TOKENS

    def take(self, tokens: int) -> np.ndarray:
        """Takes blocks for ``tokens`` tokens and returns the slot of each: int64 [tokens]. There must be enough."""
        count = blocks_for(tokens)
        assert count <= self.free, f"{count} blocks wanted, {self.free} free"
        blocks = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        fresh = count - len(blocks)
        blocks += range(self._given_up_to, self._given_up_to + fresh)
        self._given_up_to += fresh
        slots = np.array(blocks, np.int64)[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
        return slots.reshape(-1)[:tokens]

    def give_back(self, slots: np.ndarray) -> None:
        """Gives back all blocks of an array that ``take`` has returned."""
        for block in (slots[::BLOCK_TOKENS] // BLOCK_TOKENS).tolist():
            heapq.heappush(self._free, block)


class KeyValuePool:
    """The keys and values of the layers of this rank, [kv_heads, slots, head_dim] each.

    Args:
        blocks: says which slots are in use.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._layers: dict[int, list[Tensor]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> list[Tensor]:
        """Writes new keys and values [n, kv_heads, head_dim] to ``slots`` int64 [n]; returns those of all slots."""
        pools = self._layers.get(layer) or [new.new_zeros(new.shape[1], 0, new.shape[2]) for new in (key, value)]
        if pools[0].shape[1] < self._blocks.touched:
            # zeros, because attention multiplies what is at unused slots by 0
            pools = [_grown(pool, self._blocks.touched, self._blocks.count * BLOCK_TOKENS) for pool in pools]
        self._layers[layer] = pools
        for pool, new in zip(pools, (key, value), strict=True):
            pool.index_copy_(1, slots, new.transpose(0, 1))
        return pools


def _grown(pool: Tensor, needed: int, most: int) -> Tensor:
    """A copy with at least ``needed`` slots, and at least half as many again as before unless that is too many."""
    before = pool.shape[1]
    larger = pool.new_zeros(pool.shape[0], max(needed, min(before + before // 2, most)), pool.shape[2])
    larger[:, :before] = pool
    return larger
