"""Somebody's data in messages: on one line and short, whatever it is.

A record may contain a whole picture in base64 where a path belongs, and the errors of libraries repeat what they got.
"""

import reprlib
from typing import Any

MOST = 100  # characters of a quoted value
MOST_TEXT = 200  # characters of a path, or of the message of a library

_repr = reprlib.Repr(maxlevel=3, maxdict=4, maxlist=6, maxtuple=6, maxstring=MOST, maxlong=40, maxother=MOST)


def quoted(value: Any, most: int = MOST) -> str:
    """A value of a record or setting as Python writes it, on one line with at most `most` characters."""
    return _cut(_repr.repr(value), most)


def shortened(text: Any, most: int = MOST_TEXT) -> str:
    """A text, path or exception without quotation marks, on one line with at most `most` characters.

    The middle of a longer text is left out, because paths differ at their ends and causes stand at either end.
    Characters that a terminal or file could not show, such as half a surrogate pair, are escaped.
    """
    line = " ".join(_cut(str(text), 4 * most).splitlines())
    return _cut(line if line.isprintable() else repr(line)[1:-1], most)


def _cut(text: str, most: int) -> str:
    head = most * 2 // 3
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"
