"""The rows of which the reference's log-probabilities are computed: each sample once, whatever its source's size."""

import tracemalloc
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from megavlm.align import reference_rows
from megavlm.align.reference_rows import AllAnswers, AnswerData, Progress
from megavlm.sources.blend import Source
from megavlm.workers.fatal_samples import FatalSamples


class File:
    path = "a.jsonl"

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


class Draft:
    """A draft of some tokens, which counts how often it is asked for its length."""

    asked = 0

    def __init__(self, source: int, index: int):
        self.source_id, self.index, self.followers = source, index, []

    def padded_length(self, multiple: int) -> int:
        Draft.asked += 1
        return 1 + (7 * self.index) % 5


@pytest.fixture
def rows(monkeypatch):
    """rows(counts, …): the rows of one rank as lists of (source, index); every fifth sample cannot be read."""

    def drafted(renderer, file, index, kind):
        if index % 5 == 4:
            raise ValueError("broken")
        return Draft(-1, index)

    monkeypatch.setattr(reference_rows, "draft_unit", drafted)
    Draft.asked = 0

    def rows(counts, seq_length=16, dp_rank=0, dp_size=1, progress=None, places=None):
        complete = lambda drafts: SimpleNamespace(drafts=list(drafts))
        renderer = SimpleNamespace(pad_multiple=1, seq_length=seq_length, complete_row=complete)
        sources = [Source(f"s{n}", File(count), 1.0) for n, count in enumerate(counts)]
        answers = AllAnswers(
            AnswerData(sources, renderer, FatalSamples(sources, 0)), "pair", dp_rank, dp_size, 0, progress
        )
        for row in answers:
            answers.taken(row)
            if places is not None:
                places.append(dict(answers.places))
            yield [(draft.source_id, draft.index) for draft in row.drafts]

    return rows


@pytest.mark.parametrize("dp_size", [1, 3, 40])
def test_each_sample_is_in_one_row_of_one_rank(rows, dp_size):
    counts = (7, 1, 23)
    found = [sample for rank in range(dp_size) for row in rows(counts, dp_rank=rank, dp_size=dp_size) for sample in row]
    assert sorted(found) == [(s, i) for s, count in enumerate(counts) for i in range(count) if i % 5 != 4]
    for row in rows(counts):
        assert sum(1 + (7 * index) % 5 for _, index in row) <= 16


def test_the_work_per_sample_does_not_grow(rows):
    """Neither with the number of samples in a row nor with that of the sources: work is counted, not timed."""
    for seq_length in (16, 4096):
        Draft.asked = 0
        assert sum(map(len, rows([5000], seq_length))) == 4000
        assert Draft.asked == 4000
    tracemalloc.start()
    try:
        assert len(list(islice(rows([10**7] * 3), 3))) == 3
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes; a list of all samples takes thousands of MiB
    finally:
        tracemalloc.stop()


def test_an_interrupted_reference_continues_with_the_rows_that_would_have_come(rows):
    counts, dp_size = (7, 1, 23), 2
    for rank in range(dp_size):
        places: list[dict] = []
        whole = list(rows(counts, dp_rank=rank, dp_size=dp_size, places=places))
        for number in range(len(whole)):
            rest = rows(counts, dp_rank=rank, dp_size=dp_size, progress=Progress(places[number]))
            assert list(rest) == whole[number + 1 :]


def test_with_other_workers_only_the_missing_samples_are_computed(rows):
    done = [np.arange(count) % 3 == 0 for count in (7, 23)]
    found = [sample for row in rows((7, 23), progress=Progress({}, done)) for sample in row]
    assert sorted(found) == [(s, i) for s, count in enumerate((7, 23)) for i in range(count) if i % 3 and i % 5 != 4]
