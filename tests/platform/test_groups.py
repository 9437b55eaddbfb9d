"""Which data-parallel ranks share their frames."""

import pytest

from megavlm.platform.groups import blocks


@pytest.mark.parametrize(
    ("data_ranks", "ranks_of_each", "sizes"),
    [
        (1, 8, [1]),
        (4, 8, [4]),
        (8, 4, [8]),
        (9, 4, [4, 5]),
        (64, 4, [8] * 8),
        (256, 1, [32] * 8),
        (6, 64, [2, 2, 2]),  # even where two of them have more than 32 ranks, or nothing would be shared
        (3, 64, [1, 2]),
    ],
)
def test_blocks_are_even_and_have_at_most_32_ranks(data_ranks, ranks_of_each, sizes):
    found = blocks(data_ranks, ranks_of_each)
    assert [len(block) for block in found] == sizes
    assert [rank for block in found for rank in block] == list(range(data_ranks))
