"""Pairs of a right and a wrong answer to the demo's questions, and the evaluation of a reward model on them."""

import os
import random
from pathlib import Path

from megavlm.demo.answers import expected_answers
from megavlm.demo.data import read_records, write_records

DIGITS = tuple("0123456789")


def write_drawn_pairs(questions: Path, out: Path, seed: int = 0) -> int:
    """Writes one pair for each question: the right digit, and one drawn from the other nine.

    Args:
        questions: a file of questions from `write_data`.
        out: the file to write, with {"prompt", "chosen", "rejected", "images"}; picture paths are relative to it.
        seed: seed of the draws.

    Returns:
        The number of pairs.
    """
    rng = random.Random(seed)
    wrong = [rng.choice([digit for digit in DIGITS if digit != right]) for right in expected_answers(questions)]
    return write_pairs(questions, wrong, out)


def write_some(questions: Path, out: Path, every: int) -> None:
    """Writes each `every`-th question, starting with the first, with picture paths relative to `out`."""
    some = read_records(questions)[::every]
    write_records(out, [record | {"images": _seen_from(out, questions, record["images"])} for record in some])


def write_pairs(questions: Path, answers: list[str], out: Path) -> int:
    """Writes a pair of the right answer and the given answer for each wrong answer; see `write_drawn_pairs`.

    There is no pair for an answer that is blank, or right except for white space around it.
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
    """Writes each question with each digit as its answer: line 10 i + d has question i and digit d."""
    records = []
    for record in read_records(questions):
        images = _seen_from(out, questions, record["images"])
        records += [
            {"messages": [record["messages"][0], {"role": "assistant", "content": digit}], "images": images}
            for digit in DIGITS
        ]
    write_records(out, records)


def count_won(scores: list[float], expected: list[str]) -> int:
    """The number of pairs in which the right digit has a higher score than a wrong one; each question has nine pairs.

    Args:
        scores: the scores of the lines of `write_all_answers`.
        expected: the right digit of each question.

    Raises:
        ValueError: there are not ten scores per question.
    """
    if len(scores) != len(DIGITS) * len(expected):
        raise ValueError(f"{len(scores)} scores for {len(expected)} questions with {len(DIGITS)} answers each")
    won = 0
    for i, right in enumerate(expected):
        of_question = scores[len(DIGITS) * i : len(DIGITS) * (i + 1)]
        won += sum(score < of_question[int(right)] for score in of_question)
    return won


def _seen_from(out: Path, questions: Path, images: list[str]) -> list[str]:
    """Converts paths relative to the folder of `questions` to paths relative to the folder of `out`."""
    return [os.path.relpath(questions.parent / image, out.parent) for image in images]
