"""The reward functions exact, format and length. Each maker takes the options and returns the function."""

import re
from collections.abc import Callable
from typing import Any

from megavlm.rewards.texts import accepted, final_part, normalised, without_end_marks

Reward = Callable[..., list[float | None]]
"""(completions: list[str], **columns) -> one value for each completion, None where the reward does not apply."""


def exact(*, field: str, strict: bool) -> Reward:
    """1 if the final part of an answer is one of the record's right answers, otherwise 0.

    Args:
        field: the column with the right answers.
        strict: whether case, white space and punctuation count; otherwise `texts.normalised` says what does not.
    """
    form = str.strip if strict else normalised

    def judge(completions: list[str], **columns: list[Any]) -> list[float | None]:
        right = accepted(columns, field, len(completions))
        return [
            None if answers is None else float(form(final_part(text)) in map(form, answers))
            for text, answers in zip(completions, right, strict=True)
        ]

    return judge


def format(*, pattern: str | None, prompt_opens: bool) -> Reward:
    """1 if an answer has the wanted form, otherwise 0. White space and special tokens at its end do not count.

    Args:
        pattern: regular expression for the whole answer; None: <think>…</think><answer>…</answer>.
        prompt_opens: whether the prompt ends with <think>, so that answers do not begin with it.
    """
    expression = None if pattern is None else re.compile(pattern, re.DOTALL)

    def judge(completions: list[str], **columns: list[Any]) -> list[float | None]:
        texts = map(without_end_marks, completions)
        return [float(bool(expression.fullmatch(t)) if expression else _has_tags(t, prompt_opens)) for t in texts]

    return judge


def length(*, limit: int, margin: int | None, unit: str) -> Reward:
    """0 for answers of at most `limit` characters or words, then evenly down to -1 at limit + margin.

    Args:
        limit: length without a penalty.
        margin: None: as limit.
        unit: "characters" or "words".
    """

    def judge(completions: list[str], **columns: list[Any]) -> list[float | None]:
        texts = map(without_end_marks, completions)
        sizes = [len(text) if unit == "characters" else len(text.split()) for text in texts]
        over = [max(0, size - limit) / (margin or limit) for size in sizes]
        return [0.0 - min(1.0, share) for share in over]  # -0.0 would be shown as -0

    return judge


def _has_tags(text: str, prompt_opens: bool) -> bool:
    """Whether a text is <think>…</think><answer>…</answer> with each tag once and something in the answer."""
    text = "<think>" + text if prompt_opens else text
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    thought, _, rest = text.partition("</think>")
    rest = rest.strip()
    is_tagged = thought.startswith("<think>") and rest.startswith("<answer>") and rest.endswith("</answer>")
    return is_tagged and bool(rest[len("<answer>") : -len("</answer>")].strip())
