"""The choices of a question, in the ways in which public data sets write them."""

import ast
from typing import Any

from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened


def choices_of(raw: dict) -> dict[str, Any]:
    """The choices of a question by their letters, from a list, from letters with texts, or from either as a string.

    Without ``choices`` and ``options``, there are none. Raises ValueError if they are anything else.
    """
    found = raw.get("choices") or raw.get("options") or []
    if isinstance(found, str):
        try:
            found = parse_json(found)
        except ValueError:
            found = _literal(found)
    if isinstance(found, dict) and found.keys() == {"text", "label"}:  # ARC: two lists
        found = dict(zip(found["label"], found["text"], strict=True))
    if isinstance(found, list):
        found = {chr(ord("A") + place): choice for place, choice in enumerate(found)}
    if not isinstance(found, dict) or any(isinstance(choice, list | dict) for choice in found.values()):
        raise ValueError("the choices are neither a list of texts nor letters with texts")
    return found


def _literal(text: str) -> Any:
    """Lists as Python writes them (MMMU). Raises ValueError."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError):
        raise ValueError(f"the choices are the text {shortened(text, 60)!r}: write them as a list") from None
