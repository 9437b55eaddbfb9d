"""The text of rows as one buffer of bytes."""

from dataclasses import fields

import torch
from packed import row_with

from megavlm.base.errors import UserError
from megavlm.data.row import Row
from megavlm.runtime.row_text import decoded, encoded, without_pixels


def assert_same(made: Row, row: Row) -> None:
    for field in fields(Row):
        ours, theirs = getattr(made, field.name), getattr(row, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        elif field.name == "annotations":
            assert [(a.side, a.margin, a.sampled.number) for a in ours] == [
                (a.side, a.margin, a.sampled.number) for a in theirs
            ]
            assert all(torch.equal(a.sampled.logprobs, b.sampled.logprobs) for a, b in zip(ours, theirs, strict=True))
        elif field.name == "skipped_samples":
            assert [vars(one) for one in ours] == [vars(one) for one in theirs]
        else:
            assert ours == theirs, field.name


def test_rows_come_back_as_they_were():
    rows = [without_pixels(row_with(grids)) for grids in ([(4, 4), (2, 6)], [], [(2, 2)])]
    made, problem = decoded(encoded(rows))
    assert problem is None
    assert len(made) == 3
    for one, row in zip(made, rows, strict=True):
        assert_same(one, row)
    assert made[0].pixels.shape == (0, 768)
    assert made[0].loader_state is None, "it is the leader's alone"
    assert made[0].frame_lengths == [16, 12]


def test_a_problem_comes_with_the_rows_before_it():
    class Unpicklable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    made, problem = decoded(encoded([without_pixels(row_with([]))], UserError("no more rows", "add some")))
    assert (len(made), problem.message, problem.remedy) == (1, "no more rows", "add some")
    _, problem = decoded(encoded([], Unpicklable("one", "two")))
    assert "one and two" in str(problem)


def test_the_buffer_has_half_the_bytes_of_the_tensors():
    rows = [without_pixels(row_with([], 4000))]
    tensors = sum(value.nbytes for value in vars(rows[0]).values() if isinstance(value, torch.Tensor))
    pickled = 3 * 4 * 4000 * 2  # the log-probabilities of sampled answers, which only reinforcement learning has
    assert len(encoded(rows)) < 0.56 * tensors + pickled
