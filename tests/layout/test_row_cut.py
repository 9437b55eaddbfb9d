"""How rows are cut over context-parallel ranks."""

import numpy as np
import pytest

from megavlm.layout.row_cut import RowCut


def test_early_and_late_piece_of_every_segment():
    cut = RowCut.of([8, 4], context=2)
    assert cut.order.tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert cut.owner.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert cut.local.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_owner_and_local_are_the_inverse_of_order(context):
    lengths = [16, 0, 48, 32, 160]
    cut = RowCut.of(lengths, context)
    assert np.array_equal(np.sort(cut.order.ravel()), np.arange(sum(lengths)))
    assert np.array_equal(cut.order[cut.owner, cut.local], np.arange(sum(lengths)))


@pytest.mark.parametrize("context", [2, 4])
def test_every_rank_has_the_same_causal_work(context):
    cut = RowCut.of([64], context)
    pairs = (cut.order + 1).sum(axis=1)  # the token at position p sees p + 1
    assert len(set(pairs.tolist())) == 1


def test_segments_must_divide():
    with pytest.raises(AssertionError, match="cannot be cut in 4"):
        RowCut.of([8, 6], context=2)
