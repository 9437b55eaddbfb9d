"""The reward choice: whether an answer chooses the right option of a question, however it says so."""

import re
import string
from collections.abc import Mapping
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.rewards.functions import Reward
from megavlm.rewards.texts import accepted, final_part, last_box, normalised

_LONGEST = 4000  # characters at the end of an answer in which its choice is looked for
_LETTER = r"[*_\"'(\[]*\b([A-Z])\b[*_\"')\]]*"  # B, (B), **B**, "B"
_ALONE = re.compile(rf"(?:the\s+)?(?:(?:option|answer|choice)(?:\s+is)?\s*:?\s*)?{_LETTER}\s*[.:]?", re.IGNORECASE)
_LEADING = re.compile(r"[*_(\[]*([A-Z])[*_]*[.):\]]")  # "B. Paris", "(B) Paris", "**B:** Paris"
_SAID = re.compile(  # "the answer is (B)", "Answer: B", "I choose option B"
    rf"(?i:\b(?:answer|choice|option|choose|chose|pick|select)\b[\s*_]*(?:is|was|:)?[\s*_:]*(?:(?:option|choice)\s+)?)"
    rf"{_LETTER}"
)
_HEDGE = re.compile(r"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+)?[*_\"'(\[]*[A-Z]\b")  # "… B or C"
_MARKED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])[.):]?\*\*")


def choice(*, field: str, choices: str) -> Reward:
    """1 if an answer chooses the option of the record's answer, otherwise 0; also 0 if it chooses none or several.

    Args:
        field: the column with the right answers: letters, or texts of options.
        choices: the column with the texts of the options: a list (A, B, …) or a mapping from letters.
    """

    def judge(completions: list[str], **columns: list[Any]) -> list[float | None]:
        count = len(completions)
        right = accepted(columns, field, count)
        given = columns.get(choices) or [None] * count
        values: list[float | None] = []
        for text, answers, listed in zip(completions, right, given, strict=True):
            options = _options(listed, choices)
            letters = None if answers is None else [_letter_of(answer, options) for answer in answers]
            values.append(None if letters is None else float(chosen(text, options) in letters))
        return values

    return judge


def chosen(completion: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer chooses; None if it chooses none, or more than one.

    Args:
        completion: the answer.
        options: text by letter; {} if the texts are not known and any letter may be chosen.
    """
    part = final_part(completion)
    box = last_box(part)
    text = (part if box is None else re.sub(r"\\text\w*\{([^{}]*)\}", r"\1", box))[-_LONGEST:].strip()
    if alone := _ALONE.fullmatch(text):
        return _known(alone[1].upper(), options)
    same = [letter for letter, option in options.items() if normalised(option) == normalised(text)]
    if same:
        return same[0]
    said = list(_SAID.finditer(text))
    if said:
        return None if _HEDGE.match(text, said[-1].end()) else _known(said[-1][1], options)
    marked = {found[1] or found[2] for found in _MARKED.finditer(text)}
    if leading := _LEADING.match(text):
        is_list = _LEADING.match(text[leading.end() :].lstrip()) or marked - {leading[1]}  # "(A) (B)"
        return None if is_list else _known(leading[1], options)
    named = {letter for letter, option in options.items() if _names(text, option)}
    for letters in (marked, named):
        if letters:
            return _known(letters.pop(), options) if len(letters) == 1 else None
    return None


def _known(letter: str, options: Mapping[str, str]) -> str | None:
    return letter if letter in options or not options else None


def _names(text: str, option: str) -> bool:
    """Whether a text contains the text of an option as whole words."""
    wanted = normalised(option)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalised(text)) is not None


def _options(listed: Any, column: str) -> dict[str, str]:
    if listed is None:
        return {}
    if isinstance(listed, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in listed.items()}
    if isinstance(listed, list) and len(listed) <= len(string.ascii_uppercase):
        return {
            letter: re.sub(rf"^\s*\(?{letter}[.):]\s+", "", str(text))  # some data repeats the letter in the text
            for letter, text in zip(string.ascii_uppercase, listed, strict=False)
        }
    raise UserError(f"the field {column} of the record is {quoted(listed)}: not a list or mapping of options")


def _letter_of(answer: str, options: Mapping[str, str]) -> str:
    for letter, option in options.items():
        if normalised(option) == normalised(answer):
            return letter
    found = chosen(answer, options)
    if found is None:
        listed = f"none of the options {quoted(list(options.values()))}" if options else "not the letter of an option"
        raise UserError(f"the answer {quoted(answer)} of the record is {listed}")
    return found
