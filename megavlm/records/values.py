"""Values that JSON can express but no sample can use: NaN and infinity, half characters, endless nesting."""

import math
from collections.abc import Iterable
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted, shortened

_MOST_NESTED = 64  # levels; the arguments of tools have a few, and Python itself gives up after some hundreds
_LARGEST = 3.4e38  # weights and margins are held in float32, in which larger numbers are infinite


def is_number(value: Any) -> bool:
    """Whether a parsed JSON value is a finite number (true and false are none) that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def check_values(record: dict, fields: Iterable[str], source: str) -> None:
    """Check everything in these fields of a record; its other fields are its owner's business.

    Args:
        record: the parsed line.
        fields: names of fields, which need not be there.
        source: "file:line", for error messages.

    Raises:
        UserError: a number is infinite or NaN, a text contains half a surrogate pair, or values are nested too deeply.
    """
    for name in fields:
        if name in record and (fault := _fault(record[name], 0)) is not None:
            place, what, remedy = fault
            raise UserError(f"{source}: {name}{shortened(place, 60)} {what}", remedy)


def field_names(record: dict) -> str:
    """The names of a record's first fields, for error messages."""
    return ", ".join([shortened(name, 30) for name in record][:8] + ["…"] * (len(record) > 8)) or "none"


def kind_of(value: Any) -> str:
    """The kind of a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _fault(value: Any, depth: int) -> tuple[str, str, str] | None:
    """Where the first fault is ("[0].content"), what it is, and what can be done; None if there is none."""
    if isinstance(value, str):
        return None if value.isascii() else _half_character(value)
    if isinstance(value, int | float):
        if isinstance(value, bool) or _is_finite(value):
            return None
        return "", f"must be a number, found {quoted(value)}", "NaN, Infinity and numbers above 1e308 cannot be used"
    if not isinstance(value, list | dict):
        return None
    if depth == _MOST_NESTED:
        return "", f"has lists or objects inside each other, more than {_MOST_NESTED} deep", "remove the sample"
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        fault = (_fault(key, depth) if isinstance(key, str) else None) or _fault(item, depth + 1)
        if fault is not None:
            step = f".{shortened(key, 30)}" if isinstance(key, str) else f"[{key}]"
            return step + fault[0], fault[1], fault[2]
    return None


def _half_character(text: str) -> tuple[str, str, str] | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            "",
            f"contains {text[error.start]!r} at character {error.start}: half of a character, which is no text",
            "write the whole character (as \\ud83d\\ude00 is one), or remove the half",
        )
    return None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False
