"""Online packing: chooses the samples of a row among a bounded number of waiting samples."""

from bisect import bisect_right
from collections.abc import Sequence

from megavlm.data.draft import Draft

_FIRST_DRAFTS = 50  # drafts in the packing buffer when the first row is filled


def first_fill(buffer_size: int) -> int:
    """The number of drafts among which those of a worker's first row are chosen."""
    return min(_FIRST_DRAFTS, buffer_size)


def next_fill(fill: int, buffer_size: int) -> int:
    """The number of drafts for the row after one that was chosen among `fill`: the buffer grows up to `buffer_size`."""
    return min(fill * 9 // 8 + 1, buffer_size)


def take_row(waiting: list[Draft], seq_length: int, pad_multiple: int, max_patches: int | None) -> list[Draft]:
    """Takes the drafts of the next row out of those that wait; see ``best_fit``."""
    lengths = [draft.padded_length(pad_multiple) for draft in waiting]
    patches = [draft.num_patches for draft in waiting] if max_patches else None
    places = best_fit(lengths, seq_length, patches, max_patches)
    chosen = [waiting[place] for place in places]
    for place in reversed(places):
        waiting.pop(place)
    return chosen


def best_fit(
    lengths: Sequence[int], capacity: int, patches: Sequence[int] | None = None, max_patches: int | None = None
) -> list[int]:
    """Choose waiting samples for one row.

    The sample that has waited longest is always taken, so no sample waits for ever. Then the longest sample that still
    fits is added until none fits; among samples of equal length, the one that has waited longest comes first.

    Args:
        lengths: tokens of each waiting sample, in order of arrival; the first is at most `capacity`.
        capacity: tokens of the row.
        patches: patches of each waiting sample; the first has at most `max_patches`.
        max_patches: maximum number of patches in the row; None: no limit.

    Returns:
        Indices of the chosen samples in `lengths`, in ascending order.
    """
    assert lengths[0] <= capacity
    free = capacity - lengths[0]
    patches = patches if patches is not None and max_patches else [0] * len(lengths)
    patches_left = (max_patches or 0) - patches[0]
    # Sorted by ascending length and, among equals, by descending arrival, so that the last one that fits is the best.
    waiting = sorted((length, -place) for place, length in enumerate(lengths) if place)
    chosen = [0]
    while (fit := bisect_right(waiting, (free, 0)) - 1) >= 0:
        length, place = waiting.pop(fit)
        if patches[-place] > patches_left:
            continue
        patches_left -= patches[-place]
        chosen.append(-place)
        free -= length
    return sorted(chosen)
