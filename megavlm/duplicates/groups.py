"""Which samples and pictures are the same, or nearly so, by their signatures. The work is linear in their number."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from megavlm.duplicates.scan import Signatures
from megavlm.duplicates.signatures import NUM_HASHES

SAME, NEAR, NEAR_PICTURE = "same sample", "nearly the same sample", "nearly the same picture"
_BAND = 4  # hashes that must agree so that two texts are compared
_ALIKE = 13  # of NUM_HASHES: texts that share about four fifths of their groups of words
_BITS = 3  # of 64 in which two pictures may differ that look alike
_NEIGHBOURS = 2  # with how many of those that are sorted next to it a picture is compared


@dataclass(frozen=True)
class Group:
    """Samples that belong together, by their numbers in ascending order.

    Attributes:
        kind: SAME (the same words and files), NEAR (nearly the same words, and pictures that are the same or look
            alike), or NEAR_PICTURE (other files that look alike, whatever is said about them).
        samples: their numbers.
    """

    kind: str
    samples: list[int]


def groups_of(found: Signatures) -> list[Group]:
    """All groups of at least two samples. A sample that is the same as another one stands for it in other groups."""
    everything = np.flatnonzero(found.readable)
    same = [everything[run] for run in _runs(np.stack([found.text[everything], found.media[everything]], axis=1))]
    same.sort(key=lambda run: run[0])
    copies = np.concatenate([run[1:] for run in same]) if same else np.empty(0, np.int64)
    left = np.setdiff1d(everything, copies)
    groups = [Group(SAME, run.tolist()) for run in same]
    groups += [Group(NEAR, samples) for samples in _joined(_near_samples(found, left))]
    known = {sample for group in groups if group.kind == NEAR for sample in group.samples}
    for samples in _joined(_near_pictures(found, left)):
        if len(set(samples) - known) > 0 and len(samples) > 1:
            groups.append(Group(NEAR_PICTURE, samples))
    return groups


def _runs(keys: np.ndarray) -> list[np.ndarray]:
    """The numbers of the rows of each set of equal rows that has several."""
    order = np.lexsort(keys.T)
    is_new = np.ones(len(order), bool)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    starts = np.flatnonzero(is_new)
    lengths = np.diff(np.append(starts, len(order)))
    several = lengths > 1  # few of many samples
    return [
        np.sort(order[start : start + length]) for start, length in zip(starts[several], lengths[several], strict=True)
    ]


def _near_samples(found: Signatures, left: np.ndarray) -> Iterator[tuple[int, int]]:
    hashes = found.hashes[left]
    counts = np.bincount(found.owner, minlength=len(found.text))
    looks = np.zeros(len(found.text), np.uint64)
    looks[found.owner[::-1]] = found.look[::-1]  # of the first picture of each sample
    # Where many samples have the same words, those with the same or similar pictures must stand side by side.
    for band, pictures in product(range(0, NUM_HASHES, _BAND), (found.media[left], looks[left])):
        keys = hashes[:, band : band + _BAND]
        order = np.lexsort([pictures, *keys.T])
        is_pair = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
        first, second = order[:-1][is_pair], order[1:][is_pair]
        alike = (hashes[first] == hashes[second]).sum(axis=1) >= _ALIKE
        a, b = left[first[alike]], left[second[alike]]
        like = (looks[a] != 0) & (looks[b] != 0) & (_distance(looks[a], looks[b]) <= _BITS) & (counts[a] == counts[b])
        fits = (found.media[a] == found.media[b]) | like
        yield from zip(a[fits].tolist(), b[fits].tolist(), strict=True)


def _near_pictures(found: Signatures, left: np.ndarray) -> Iterator[tuple[int, int]]:
    chosen = np.flatnonzero((found.look != 0) & np.isin(found.owner, left))
    _, firsts = np.unique(found.picture[chosen], return_index=True)
    chosen = chosen[firsts]  # each file once
    looks, owners = found.look[chosen], found.owner[chosen]
    for turn in (0, 16, 32, 48):  # bits that differ stand at the end in one of these orders
        turned = (looks << np.uint64(turn)) | (looks >> np.uint64((64 - turn) % 64)) if turn else looks
        order = np.argsort(turned, kind="stable")
        for step in range(1, _NEIGHBOURS + 1):
            a, b = order[:-step], order[step:]
            fits = (_distance(looks[a], looks[b]) <= _BITS) & (owners[a] != owners[b])
            yield from zip(owners[a[fits]].tolist(), owners[b[fits]].tolist(), strict=True)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.bitwise_count(first ^ second)


def _joined(pairs: Iterator[tuple[int, int]]) -> list[list[int]]:
    """The samples that pairs connect, in ascending order."""
    root: dict[int, int] = {}

    def find(number: int) -> int:
        while root.setdefault(number, number) != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    for a, b in pairs:
        a, b = find(a), find(b)
        root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for number in sorted(root):
        groups.setdefault(find(number), []).append(number)
    return [groups[first] for first in sorted(groups)]
