"""What an answer got: the parts by reward, their weighted sum, and the rewards that failed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """The rewards of one answer.

    Attributes:
        total: the weighted sum; None if a reward with a weight failed, or if none applies to the answer.
        parts: by the name of each reward, its value without weight; None if it failed or does not apply.
        failures: "NAME: cause" for each reward that failed.
    """

    total: float | None
    parts: dict[str, float | None]
    failures: list[str]


def score(parts: Mapping[str, float | None], failures: Sequence[str], weights: Mapping[str, float]) -> Score:
    """Adds rewards up in float64. An answer whose reward failed has no total: it is unknown, not 0.

    Args:
        parts: value of each reward; None if it failed or does not apply.
        failures: "NAME: cause" for each reward that failed.
        weights: weight of each reward. One with weight 0 has no influence on the total, not even by failing.
    """
    failed = {failure.partition(": ")[0] for failure in failures}
    weighted = [weights[name] * value for name, value in parts.items() if value is not None and weights[name]]
    is_known = weighted and not any(weights[name] for name in failed)
    return Score(math.fsum(weighted) if is_known else None, dict(parts), list(failures))


def columns_of(record: Mapping[str, Any], prompt: str, count: int) -> dict[str, list[Any]]:
    """The columns that reward functions get for `count` answers to one prompt: each field of its record, repeated.

    Args:
        record: the record as written in the data.
        prompt: text of the prompt; the column `prompts`. It replaces a field of that name; a field `completions` is
            left out, because the answers have that name.
        count: number of answers.
    """
    fields = {**record, "prompts": prompt}
    return {name: [value] * count for name, value in fields.items() if name != "completions"}


def overlong_penalty(tokens: int, max_new_tokens: int, cache: int) -> float:
    """The penalty for long answers of DAPO (2503.14476).

    Args:
        tokens: number of tokens of the answer.
        max_new_tokens: number of tokens at which answers are cut off.
        cache: the penalty begins this number of tokens before, 1 to max_new_tokens.

    Returns:
        0 up to max_new_tokens - cache; from there evenly down to -1 at max_new_tokens, and -1 beyond.
    """
    assert 1 <= cache <= max_new_tokens, "cache is from 1 to max_new_tokens"
    return -min(1.0, max(0.0, (tokens - (max_new_tokens - cache)) / cache))
