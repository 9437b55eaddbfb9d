"""Which samples share a row: online, among a bounded number of samples that wait."""

from bisect import bisect_right
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose waiting samples for one row.

    The sample that has waited longest is always taken, so none waits for ever; then, again and again, the longest
    that still fits (of equally long ones, that which has waited longest).

    Args:
        lengths: tokens of each waiting sample, in order of arrival; the first is at most `capacity`.
        capacity: tokens of the row.

    Returns:
        Places of the chosen samples in `lengths`, ascending.
    """
    assert lengths[0] <= capacity
    free = capacity - lengths[0]
    # Ascending in length and, among equals, descending in arrival: the last that fits is the best.
    waiting = sorted((length, -place) for place, length in enumerate(lengths) if place)
    chosen = [0]
    while (fit := bisect_right(waiting, (free, 0)) - 1) >= 0:
        length, place = waiting.pop(fit)
        chosen.append(-place)
        free -= length
    return sorted(chosen)
