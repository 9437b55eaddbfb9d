"""Pairs of answers to the demo's questions, a right one and a wrong one, and what a reward model makes of them."""

import os
import random
from pathlib import Path

from megavlm.demo.answers import expected_answers
from megavlm.demo.data import read_records, write_records

DIGITS = tuple("0123456789")


def write_drawn_pairs(questions: Path, out: Path, seed: int = 0) -> int:
    """Pairs of the right digit and one drawn from the other nine, one for each question.

    Args:
        questions: a tuning file that `write_data` made.
        out: the file to write: {"prompt", "chosen", "rejected", "images"}, picture paths relative to it.

    Returns: the number of pairs.
    """
    rng = random.Random(seed)
    wrong = [rng.choice([digit for digit in DIGITS if digit != right]) for right in expected_answers(questions)]
    return write_pairs(questions, wrong, out)


def write_some(questions: Path, out: Path, every: int) -> None:
    """Every `every`-th of the questions, from the first on, picture paths relative to `out`."""
    some = read_records(questions)[::every]
    write_records(out, [record | {"images": _seen_from(out, questions, record["images"])} for record in some])


def write_pairs(questions: Path, answers: list[str], out: Path) -> int:
    """Pairs of the right answer and the given one where that is wrong; as `write_drawn_pairs`.

    Answers that are blank, or right apart from blanks around them, make no pair.
    """
    pairs = []
    for record, answer in zip(read_records(questions), answers, strict=True):
        prompt, right = (turn["content"] for turn in record["messages"])
        if answer.strip() not in ("", right):
            images = _seen_from(out, questions, record["images"])
            pairs.append({"prompt": prompt, "chosen": right, "rejected": answer, "images": images})
    write_records(out, pairs)
    return len(pairs)


def write_all_answers(questions: Path, out: Path) -> None:
    """Tuning records of every question with every digit as its answer: line 10 i + d has question i and digit d."""
    records = []
    for record in read_records(questions):
        images = _seen_from(out, questions, record["images"])
        records += [
            {"messages": [record["messages"][0], {"role": "assistant", "content": digit}], "images": images}
            for digit in DIGITS
        ]
    write_records(out, records)


def count_won(scores: list[float], expected: list[str]) -> int:
    """How many of the nine pairs of each question the right digit wins; a draw is no win.

    Args:
        scores: of the lines of `write_all_answers`.
        expected: the right digit of each question.

    Raises ValueError unless there are ten scores a question.
    """
    if len(scores) != len(DIGITS) * len(expected):
        raise ValueError(f"{len(scores)} scores for {len(expected)} questions of {len(DIGITS)} answers")
    won = 0
    for i, right in enumerate(expected):
        of_question = scores[len(DIGITS) * i : len(DIGITS) * (i + 1)]
        won += sum(score < of_question[int(right)] for score in of_question)
    return won


def _seen_from(out: Path, questions: Path, images: list[str]) -> list[str]:
    """Paths relative to the folder of `questions` as paths relative to that of `out`."""
    return [os.path.relpath(questions.parent / image, out.parent) for image in images]
