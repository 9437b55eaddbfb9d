"""Which sample a data worker takes next: blending, shuffling, epochs, and the place in all of them.

There is no random state: the n-th sample of a worker is a function of the settings and n.
"""

import hashlib
from collections.abc import Sequence

from megavlm.data.permutation import shuffled


class SampleOrder:
    """The samples of one data worker, in order, without end.

    A source's epochs, laid end to end, are one sequence of places. Worker w of all W workers takes the places base + w,
    base + w + W, …; as rows come from the workers in turn, the rows that all ranks see at one time are neighbours in
    it. An epoch is exact for any W.

    Sources take turns by stride: the one whose next turn comes earliest, its k-th turn at (k + phase) / share. So at
    any moment each source has had its share to within a sample, and the phases, which differ between workers, spread
    the turns of a small source over them.

    Args:
        shares: share of the samples that each source gives.
        counts: samples in each source.
        seed: of order and phases; None keeps the order of the files.
        worker: number of this worker among all of ``num_workers``.
    """

    def __init__(self, shares: Sequence[float], counts: Sequence[int], seed: int | None, worker: int, num_workers: int):
        self._shares, self._counts, self._seed = shares, counts, seed
        self._worker, self._num_workers = worker, num_workers
        self._phases = [_hash(seed or 0, number, worker) / 2**48 for number in range(len(shares))]
        self._keys = [None if seed is None else _hash(seed, number) for number in range(len(shares))]
        self.state = {"taken": [0] * len(shares), "base": [0] * len(shares), "ahead": [[] for _ in shares]}

    def __next__(self) -> tuple[int, int]:
        """(number of the source, number of the sample in it)."""
        while True:
            taken = self.state["taken"]
            turns = [(k + phase) / share for k, phase, share in zip(taken, self._phases, self._shares, strict=True)]
            source = turns.index(min(turns))
            place = self.state["base"][source] + self._worker + self._num_workers * taken[source]
            taken[source] += 1
            ahead = self.state["ahead"][source]
            if place not in ahead:
                break
            ahead.remove(place)
        epoch, place = divmod(place, self._counts[source])
        key = self._keys[source]
        return source, place if key is None else shuffled(place, self._counts[source], key + epoch)


def reshard(states: Sequence[dict], num_workers: int) -> list[dict]:
    """The states of ``SampleOrder`` of all workers made into those of another number of workers.

    What some of the old workers had taken beyond the first place that is still free (``ahead``) is passed over by the
    new ones: nothing is taken twice, and nothing is left out.
    """
    bases, aheads, old_workers = [], [], len(states)
    for source in range(len(states[0]["base"])):
        base, taken = states[0]["base"][source], {place for state in states for place in state["ahead"][source]}
        ends = [base + worker + old_workers * state["taken"][source] for worker, state in enumerate(states)]
        first = min(ends)  # all places before it are taken
        for end in ends:  # each worker's own places, down from the one before its end
            taken.update(range(end - old_workers, first - 1, -old_workers))
        while first in taken:
            first += 1
        bases.append(first)
        aheads.append(sorted(place for place in taken if place > first))
    return [
        {
            "taken": [0] * len(bases),
            "base": list(bases),
            "ahead": [
                [place for place in ahead if (place - base) % num_workers == worker]  # each its own alone
                for base, ahead in zip(bases, aheads, strict=True)
            ],
        }
        for worker in range(num_workers)
    ]


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(",".join(map(str, numbers)).encode()).digest()[:6])
