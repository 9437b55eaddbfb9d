"""Which samples share a row, and in which order samples come."""

import random
from itertools import pairwise

import pytest

from megavlm.data.packing import best_fit
from megavlm.data.permutation import shuffled


def test_the_longest_waiting_comes_first_and_the_best_fit_next():
    assert best_fit([5, 9, 4, 3, 5, 1], 10) == [0, 4]
    assert best_fit([5, 9, 4, 3, 7, 1], 10) == [0, 2, 5]
    assert best_fit([5, 3, 3, 3], 10) == [0, 1]  # of equals, the one that came first
    assert best_fit([10, 1], 10) == [0]
    assert best_fit([3], 10) == [0]


def fill(lengths, capacity, buffer):
    """Useful share of the rows, packing as RowDataset does: refilled after each row."""
    arriving, waiting, rows, used = iter(lengths), [], 0, 0
    while True:
        waiting += [length for length, _ in zip(arriving, range(buffer - len(waiting)), strict=False)]
        if len(waiting) < buffer:
            return used / (rows * capacity)
        chosen = set(best_fit(waiting, capacity))
        total = sum(waiting[place] for place in chosen)
        assert total <= capacity
        rows, used = rows + 1, used + total
        waiting = [length for place, length in enumerate(waiting) if place not in chosen]


def test_rows_are_full():
    """Lengths spread as in mixed sets: texts log-normal around 600 tokens, beside pictures of a few sizes."""
    draw = random.Random(0)
    lengths = [min(8192, int(draw.lognormvariate(6.4, 1.0)) + draw.choice([0, 256, 1024, 2560])) for _ in range(8000)]
    assert fill(lengths, 8192, 1000) > 0.98
    assert fill(lengths, 8192, 1) < 0.3


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_shuffled_is_a_permutation(count):
    orders = [[shuffled(place, count, key) for place in range(count)] for key in range(3)]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 7:
        assert orders[0] != orders[1] != orders[2]


def test_shuffled_orders_are_even():
    """Each sample comes equally often into each tenth of the order, and neighbours do not stay together."""
    count, orders = 50, 2000
    tenths = [[0] * 10 for _ in range(count)]
    neighbours = 0
    for key in range(orders):
        order = [shuffled(place, count, key) for place in range(count)]
        for place, index in enumerate(order):
            tenths[index][place * 10 // count] += 1
        neighbours += sum(abs(a - b) == 1 for a, b in pairwise(order))
    expected = orders / 10
    assert all(abs(seen - expected) < 6 * expected**0.5 for row in tenths for seen in row)
    assert abs(neighbours / orders - 2 * (count - 1) / count) < 0.2
