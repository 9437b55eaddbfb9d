"""How a row of tokens is cut over the ranks of a model-parallel group: by context, then by sequence parallelism.

Context parallelism cuts every segment of the row in 2 × context equal pieces; rank r takes piece r and, counted from
the end, piece r again, so that causal attention costs every rank the same. A rank holds its pieces in the order of the
row. Sequence parallelism cuts what a context rank holds in equal slices. (Transformer Engine cuts the same way.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowCut:
    """The positions of one row's tokens.

    Attributes:
        order: int64 [context, T / context], positions in the row of the tokens that each context rank holds.
        owner: int64 [T], context rank of each token. local: int64 [T], index of each token among its owner's.
    """

    order: np.ndarray
    owner: np.ndarray
    local: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], context: int) -> "RowCut":
        """``lengths``: tokens of the row's segments, each divisible by 2 × context where context is more than 1."""
        total = sum(lengths)
        if context == 1:
            everything = np.arange(total)
            return cls(everything[None], np.zeros(total, dtype=np.int64), everything)
        lengths = np.asarray([length for length in lengths if length], dtype=np.int64)
        pieces = 2 * context
        assert not (lengths % pieces).any(), f"segments {lengths.tolist()} cannot be cut in {pieces}"
        # piece of each token within its segment
        piece = np.repeat(np.tile(np.arange(pieces), len(lengths)), np.repeat(lengths // pieces, pieces))
        owner = np.minimum(piece, pieces - 1 - piece)
        order = np.argsort(owner, kind="stable").reshape(context, -1)
        local = np.empty(total, dtype=np.int64)
        local[order] = np.arange(order.shape[1])
        return cls(order, owner, local)
