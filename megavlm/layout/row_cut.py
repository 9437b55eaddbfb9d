"""How a row of tokens is cut over the ranks of a model-parallel group: by context parallelism, then into slices.

Context parallelism cuts every segment of the row into 2 × context equal pieces. Rank r has piece r and piece r counted
from the end, so that causal attention costs all ranks the same. A rank has its pieces in the order of the row. Sequence
parallelism cuts the tokens of a context rank into equal slices. (Transformer Engine cuts rows in the same way.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowCut:
    """The context rank of each token in a row.

    Attributes:
        order: int64 [context, T / context], positions in the row of the tokens of each context rank.
        owner: int64 [T], context rank of each token.
        local: int64 [T], index of each token among the tokens of its rank.
    """

    order: np.ndarray
    owner: np.ndarray
    local: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], context: int) -> "RowCut":
        """Cuts a row with segments of ``lengths`` tokens, which 2 × context must divide unless context is 1."""
        total = sum(lengths)
        if context == 1:
            everything = np.arange(total)
            return cls(everything[None], np.zeros(total, dtype=np.int64), everything)
        segments = np.asarray([length for length in lengths if length], dtype=np.int64)
        pieces = 2 * context
        assert not (segments % pieces).any(), f"segments {segments.tolist()} cannot be cut in {pieces}"
        # for each token the index of its piece within the segment
        piece = np.repeat(np.tile(np.arange(pieces), len(segments)), np.repeat(segments // pieces, pieces))
        owner = np.minimum(piece, pieces - 1 - piece)
        order = np.argsort(owner, kind="stable").reshape(context, -1)
        local = np.empty(total, dtype=np.int64)
        local[order] = np.arange(order.shape[1])
        return cls(order, owner, local)
