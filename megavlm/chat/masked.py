"""Copies of conversations in which short markers stand for all texts.

The chat template writes the same frame around a marker as around a text, but a marker contains nothing that could be
taken for a part of the frame, such as an end token.
"""

import json
import re
from bisect import bisect_left, bisect_right
from typing import Any

# Templates look for these and for white space, so they stay. What is between them is masked.
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")
_PLAIN = re.compile(r"[\w .:/$-]*")  # names of arguments and types, which stay, must be no part of a frame


class MaskedConversation:
    """A conversation with markers.

    Args:
        messages: the conversation. Roles, and the names of arguments, are not masked.
        text: the conversation as the template writes it; markers contain a character that it does not.

    Attributes:
        messages: the messages with markers; None if they cannot be masked.
    """

    def __init__(self, messages: list[dict], text: str):
        # From Unicode's private use area, in which no standard text has all characters.
        self._bracket = next((char for char in map(chr, range(0xE000, 0xF900)) if char not in text), "")
        self._pieces: list[tuple[str, int, bool]] = []  # of each marker: text, number of the message, whether in a call
        self._is_plain = bool(self._bracket)
        masked = [self._message(number, message) for number, message in enumerate(messages)]
        self.messages = masked if self._is_plain else None

    def _message(self, number: int, message: dict) -> dict:
        return {
            name: value if name == "role" else self._value(value, number, name == "tool_calls")
            for name, value in message.items()
        }

    def _value(self, value: Any, number: int, in_call: bool) -> Any:
        if isinstance(value, str):
            return "".join(self._masked(piece, number, in_call) for piece in _TAGS.split(value))
        if isinstance(value, list):
            return [self._value(item, number, in_call) for item in value]
        if not isinstance(value, dict):
            return value
        kept = [*value, value["type"]] if isinstance(value.get("type"), str) else [*value]
        self._is_plain &= all(map(_PLAIN.fullmatch, kept))
        return {
            name: item if name == "type" and isinstance(item, str) else self._value(item, number, in_call)
            for name, item in value.items()
        }

    def _masked(self, piece: str, number: int, in_call: bool) -> str:
        core = piece.strip()
        if not core or _TAGS.fullmatch(core):
            return piece
        before = len(piece) - len(piece.lstrip())
        self._pieces.append((core, number, in_call))
        marker = f"{self._bracket}{len(self._pieces) - 1}{self._bracket}"
        return piece[:before] + marker + piece[before + len(core) :]

    def align(self, masked: str, text: str) -> "Alignment | None":
        """Where each part of the template's output for the markers stands in its output for the texts.

        Args:
            masked: the template's output for ``messages``.
            text: its output for the conversation itself.

        Returns:
            None unless `masked` is equal to `text`, character by character, once its markers are replaced.
        """
        alignment, place, end = Alignment(), 0, 0
        for found in re.finditer(f"{self._bracket}([0-9]+){self._bracket}", masked):
            frame = masked[end : found.start()]
            if not text.startswith(frame, place):
                return None
            alignment.add(end, place)
            place += len(frame)
            piece, number, in_call = self._pieces[int(found[1])]
            alignment.markers.append((found.start(), number))
            # Templates write the arguments of calls as JSON.
            written = json.dumps(piece, ensure_ascii=False)[1:-1] if in_call else piece
            if in_call and not text.startswith(written, place):
                written = piece
            if not text.startswith(written, place):
                return None
            place, end = place + len(written), found.end()
        alignment.add(end, place)
        return alignment if text[place:] == masked[end:] else None


class Alignment:
    """Maps places in the output with markers to places in the output with texts."""

    def __init__(self) -> None:
        self._from: list[int] = []
        self._to: list[int] = []
        self.markers: list[tuple[int, int]] = []  # place of each marker, and the number of its message

    def add(self, start: int, place: int) -> None:
        """The frame that begins at `start` begins at `place` in the other output."""
        self._from.append(start)
        self._to.append(place)

    def place(self, start: int) -> int:
        """The place that corresponds to `start`, a place in or at the end of a frame."""
        frame = bisect_right(self._from, start) - 1
        return self._to[frame] + start - self._from[frame]

    def owners(self, start: int, end: int) -> set[int]:
        """The numbers of the messages whose markers begin from `start` up to `end`."""
        first, behind = bisect_left(self.markers, (start, -1)), bisect_left(self.markers, (end, -1))
        return {number for _, number in self.markers[first:behind]}
