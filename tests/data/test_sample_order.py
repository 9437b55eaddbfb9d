"""Places in the data: taken once each, whatever the number of workers and however far each of them has come."""

import random
from collections import Counter

import pytest

from megavlm.data.permutation import shuffled
from megavlm.data.sample_order import SampleOrder, reshard

COUNTS = (41, 10)


def workers_of(num, seed=3, states=None):
    workers = [SampleOrder((0.7, 0.3), COUNTS, seed, worker, num) for worker in range(num)]
    for worker, state in zip(workers, states or [], strict=False):
        worker.state = state
    return workers


@pytest.mark.parametrize("seed", [None, 3])
def test_workers_together_take_each_sample_once_an_epoch(seed):
    for num in (1, 3, 8):
        workers = [SampleOrder((1.0,), (41,), seed, worker, num) for worker in range(num)]
        drawn = [next(workers[n % num])[1] for n in range(3 * 41)]
        epochs = [drawn[:41], drawn[41:82], drawn[82:]]
        assert all(sorted(epoch) == list(range(41)) for epoch in epochs)
        assert (epochs[0] == list(range(41))) == (seed is None)
        assert (epochs[0] == epochs[1]) == (seed is None)


@pytest.mark.parametrize("numbers", [(4, 2), (2, 3), (6, 4, 1, 5)])
def test_distinct_samples_are_counted_by_position_whatever_the_number_of_workers(numbers):
    """Against a list of all that was drawn."""
    random_, seen, states = random.Random(1), [[], []], None
    for num in numbers:
        workers = workers_of(num, states=reshard(states, num) if states else None)
        for worker in workers:
            for _ in range(random_.randrange(12)):
                source, index = next(worker)
                seen[source].append(index)
            for source, count in enumerate(COUNTS):
                taken, new = (sum(part[source][k] for part in (w.drawn for w in workers)) for k in (0, 1))
                assert taken == len(seen[source])
                assert new <= len(set(seen[source])) <= min(taken, count)
        states = [worker.state for worker in workers]
    while any(len(set(of_source)) < count for of_source, count in zip(seen, COUNTS, strict=True)):
        for worker in workers:
            source, index = next(worker)
            seen[source].append(index)
    while any(sum(w.drawn[source][1] for w in workers) < count for source, count in enumerate(COUNTS)):
        for worker in workers:
            next(worker)
    assert [sum(w.drawn[source][1] for w in workers) for source in (0, 1)] == list(COUNTS)


def test_shares_hold_at_any_moment():
    draws = SampleOrder((0.5, 0.3, 0.19, 0.01), (9, 9, 9, 9), 0, 5, 7)
    counts = Counter()
    for number in range(1, 2000):
        counts[next(draws)[0]] += 1
        assert all(abs(counts[source] - share * number) < 2 for source, share in enumerate((0.5, 0.3, 0.19, 0.01))), (
            number
        )


@pytest.mark.parametrize("numbers", [(4, 2), (2, 3), (6, 4, 1, 5), (1, 7, 2, 3, 3)])
def test_dealt_anew_takes_no_place_twice_and_leaves_none_out(numbers):
    """Each worker comes as far as it may; the samples of every whole epoch that all have passed came exactly once."""
    random_ = random.Random(0)
    for _ in range(20):
        seen, states = [Counter(), Counter()], None
        for num in numbers:
            workers = workers_of(num, states=reshard(states, num) if states else None)
            for worker in workers:
                for _ in range(random_.randrange(60)):
                    source, index = next(worker)
                    seen[source][index] += 1
            states = [worker.state for worker in workers]
        for source, count in enumerate(COUNTS):
            last = reshard(states, 1)[0]
            first_free, ahead = last["base"][source], last["ahead"][source]
            key = SampleOrder((0.7, 0.3), COUNTS, 3, 0, 1).key(source)
            taken = [*range(first_free), *ahead]
            assert len(set(taken)) == len(taken)
            expected = Counter(shuffled(place % count, count, key + place // count) for place in taken)
            assert seen[source] == expected


def test_state_stays_small():
    workers = workers_of(4)
    for number, worker in enumerate(workers):
        for _ in range(20000 + 30 * number):
            next(worker)
    state = reshard([worker.state for worker in workers], 3)[0]
    assert all(len(places) < 4 * 100 for places in state["ahead"])
