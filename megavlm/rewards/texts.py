r"""Where the final answer stands in a sampled text, and which answers a record accepts.

All searches take time proportional to the length of the text: a policy may well sample ``<answer>`` ten thousand times.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.records.questions import reference_of

_END_MARKS = re.compile(r"(?:<\|\w+\|>\s*)+\Z")  # <|im_end|> and the like, where an answer was decoded with its end


def final_part(completion: str) -> str:
    """What an answer gives as its result: the last <answer>…</answer>, otherwise all that follows its thinking.

    Thinking ends with the last </think>. An answer that was cut off while thinking has no result: "".
    """
    text = without_end_marks(completion)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    return text.rpartition("</think>")[2].partition("<think>")[0].strip()


def without_end_marks(completion: str) -> str:
    """A text without special tokens at its end, and without white space around it."""
    text = completion.strip()
    # Only the end is searched: elsewhere the expression would be tried at every token of the text.
    return text[:-200] + _END_MARKS.sub("", text[-200:]).rstrip() if text.endswith("|>") else text


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…}; None if there is none, or if it is not closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position].strip()
    return None


def normalised(text: str) -> str:
    """A text for comparison: Unicode's NFKC form, lower case, single spaces, no quotes or final punctuation."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.lstrip("\"'`*“‘„").rstrip(" .,;:!?\"'`*”’")


def accepted(columns: Mapping[str, Sequence[Any]], field: str, count: int) -> list[list[str] | None]:
    """The right answers to each prompt; None where the record has none.

    Args:
        columns: the columns of a reward function.
        field: the column that has them: a text, a number, or a list of those. Records without it have their assistant
            messages at the end as answer.
        count: number of completions.

    Raises:
        UserError: a record has something else as answer.
    """
    given = columns.get(field) or [None] * count
    messages = columns.get("messages") or [None] * count
    return [_accepted(value, said, field) for value, said in zip(given, messages, strict=True)]


def _accepted(value: Any, messages: Any, field: str) -> list[str] | None:
    if value is None:
        said = reference_of({"messages": messages}) if isinstance(messages, list) else None
        return None if said is None else [said]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str | int | float) for item in values):
        raise UserError(
            f"the field {field} of the record is {quoted(value)}: neither text nor number, nor a list of them"
        )
    return [str(item) for item in values]
