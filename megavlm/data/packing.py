"""Which samples share a row: online, among a bounded number of samples that wait."""

from bisect import bisect_right
from collections.abc import Sequence


def best_fit(
    lengths: Sequence[int], capacity: int, patches: Sequence[int] | None = None, max_patches: int | None = None
) -> list[int]:
    """Choose waiting samples for one row.

    The sample that has waited longest is always taken, so none waits for ever; then, again and again, the longest
    that still fits (of equally long ones, that which has waited longest).

    Args:
        lengths: tokens of each waiting sample, in order of arrival; the first is at most `capacity`.
        capacity: tokens of the row.
        patches: of each waiting sample; the first has at most `max_patches`.
        max_patches: of the row; None: no bound.

    Returns:
        Places of the chosen samples in `lengths`, ascending.
    """
    assert lengths[0] <= capacity
    free = capacity - lengths[0]
    patches_left = max_patches - patches[0] if max_patches else None
    # Ascending in length and, among equals, descending in arrival: the last that fits is the best.
    waiting = sorted((length, -place) for place, length in enumerate(lengths) if place)
    chosen = [0]
    while (fit := bisect_right(waiting, (free, 0)) - 1) >= 0:
        length, place = waiting.pop(fit)
        if patches_left is not None:
            if patches[-place] > patches_left:
                continue
            patches_left -= patches[-place]
        chosen.append(-place)
        free -= length
    return sorted(chosen)
