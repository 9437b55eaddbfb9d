"""The order in which a data worker takes samples: blending, shuffling, epochs, and the position in them.

There is no random state: the n-th sample of a worker is a function of the settings and of n.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TypedDict

from megavlm.data.permutation import shuffled


class OrderState(TypedDict):
    """The state of a ``SampleOrder``; each list has one entry for each source.

    Attributes:
        taken: number of positions that the worker has taken.
        base: the position from which the workers started to count.
        ahead: positions that were taken before a change of the number of workers, to be skipped.
        keys: the number by which the order of a source is drawn: its place among the sources when it was added. It
            stays when sources are added before it, so that an epoch goes on in the same order.
        tokens: number of tokens of the samples that were taken (see ``SampleOrder.count``).
    """

    taken: list[int]
    base: list[int]
    ahead: list[list[int]]
    keys: list[int]
    tokens: list[int]


class SampleOrder:
    """An iterator over the samples of one data worker; it has an end if all sources have one.

    The epochs of a source form one sequence of positions. Worker w of W workers takes the positions base + w,
    base + w + W, …. Rows come from the workers in turn, so the rows that all ranks see at the same time are adjacent in
    this sequence. For any W, each epoch contains each sample exactly once.

    Sources are blended by stride scheduling: turn k of a source is due at time (k + phase) / share, and the source
    whose next turn is due first gives the next sample. At any time, each source has therefore given its share to within
    one sample. The phases differ between workers, which spreads the turns of a small source over the workers.

    Args:
        shares: the share of samples that each source gives.
        counts: the number of samples in each source.
        seed: the seed of order and phases; None keeps the order of the files.
        worker: the number of this worker among all ``num_workers``.
        num_workers: the number of workers on all ranks.
        ends: for each source the position at which it ends, over all epochs; None: there are no such ends.
        max_tokens: for each source the number of tokens after which it ends, or None. Each worker gives its share of
            them, to within one sample, so that its samples do not depend on those of other workers. None: no limits.
    """

    def __init__(
        self,
        shares: Sequence[float],
        counts: Sequence[int],
        seed: int | None,
        worker: int,
        num_workers: int,
        ends: Sequence[int] | None = None,
        max_tokens: Sequence[int | None] | None = None,
    ):
        self._ends = ends
        self._shares, self._counts, self._seed = shares, counts, seed
        self._worker, self._num_workers = worker, num_workers
        limits = max_tokens or [None] * len(shares)
        self._limits = [math.inf if n is None else _part(n, worker, num_workers) for n in limits]
        self._phases = [_hash(seed or 0, number, worker) / 2**48 for number in range(len(shares))]
        self.state: OrderState = {
            "taken": [0] * len(shares),
            "base": [0] * len(shares),
            "ahead": [[] for _ in shares],
            "keys": list(range(len(shares))),
            "tokens": [0] * len(shares),
        }

    def __next__(self) -> tuple[int, int]:
        """The next sample: (number of the source, number of the sample in it). Raises StopIteration at the end."""
        while True:
            taken = self.state["taken"]
            turns = [(k + phase) / share for k, phase, share in zip(taken, self._phases, self._shares, strict=True)]
            turns = [math.inf if self._has_ended(source) else turn for source, turn in enumerate(turns)]
            if min(turns) == math.inf:
                raise StopIteration
            source = turns.index(min(turns))
            place = self._place(source)
            taken[source] += 1
            ahead = self.state["ahead"][source]
            if place not in ahead:
                break
            ahead.remove(place)
        epoch, place = divmod(place, self._counts[source])
        if self._seed is None:
            return source, place
        return source, shuffled(place, self._counts[source], self.key(source) + epoch)

    def count(self, source: int, tokens: int) -> None:
        """Counts the tokens of a sample that was taken from a source."""
        self.state["tokens"][source] += tokens

    def has_given(self, source: int) -> bool:
        """Whether this worker has given its share of the ``max_tokens`` of a source."""
        return self.state["tokens"][source] >= self._limits[source]

    def _has_ended(self, source: int) -> bool:
        return self.has_given(source) or (self._ends is not None and self._place(source) >= self._ends[source])

    def key(self, source: int) -> int:
        """The number from which the order of a source's first epoch is drawn; later epochs have the next ones."""
        return _hash(self._seed or 0, self.state["keys"][source])

    def _place(self, source: int) -> int:
        """The next position of this worker in a source."""
        return self.state["base"][source] + self._worker + self._num_workers * self.state["taken"][source]

    @property
    def drawn(self) -> list[tuple[int, int]]:
        """For each source, how many positions have been taken, and how many of them belong to its first epoch.

        What was taken before a change of the number of workers counts for one of the workers, so that the sums over all
        workers are those of the run. The positions of an epoch are distinct samples.
        """
        return [self._drawn(source, count) for source, count in enumerate(self._counts)]

    def _drawn(self, source: int, count: int) -> tuple[int, int]:
        taken, base, ahead = self.state["taken"][source], self.state["base"][source], self.state["ahead"][source]
        before = base if self._worker == 0 else 0
        first = len(range(base + self._worker, count, self._num_workers))  # this worker's positions in the first epoch
        of_first_epoch = min(taken, first) + min(before, count) + sum(place < count for place in ahead)
        return taken + before + len(ahead), of_first_epoch


def reshard(states: Sequence[OrderState], num_workers: int) -> list[OrderState]:
    """Convert the ``SampleOrder`` states of all workers to the states of a different number of workers.

    Some of the old workers may have taken positions beyond the first free position. These are kept in ``ahead`` and
    skipped by the new workers, so that no sample is repeated or left out.
    """
    bases, aheads, old_workers = [], [], len(states)
    given = [sum(tokens) for tokens in zip(*(state["tokens"] for state in states), strict=True)]
    for source in range(len(states[0]["base"])):
        base, taken = states[0]["base"][source], {place for state in states for place in state["ahead"][source]}
        ends = [base + worker + old_workers * state["taken"][source] for worker, state in enumerate(states)]
        first = min(ends)  # all positions before it are taken
        for end in ends:  # the positions that each worker has taken, in descending order
            taken.update(range(end - old_workers, first - 1, -old_workers))
        while first in taken:
            first += 1
        bases.append(first)
        aheads.append(sorted(place for place in taken if place > first))
    return [
        {
            "taken": [0] * len(bases),
            "base": list(bases),
            "keys": list(states[0]["keys"]),
            "tokens": [_part(total, worker, num_workers) for total in given],
            "ahead": [
                [place for place in ahead if (place - base) % num_workers == worker]  # only this worker's positions
                for base, ahead in zip(bases, aheads, strict=True)
            ],
        }
        for worker in range(num_workers)
    ]


def _part(total: int, worker: int, num_workers: int) -> int:
    """A worker's part of a number that is divided among all."""
    return total // num_workers + (worker < total % num_workers)


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(",".join(map(str, numbers)).encode()).digest()[:6])
