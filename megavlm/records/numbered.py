"""Pictures in the fields ``image_1``, ``image_2``, …, and their marks ``<image 1>``, as MMMU and others have them."""

import re
from typing import Any

_FIELD = re.compile(r"image_([1-9]\d?)")
_MARK = re.compile(r"<image[ _]([1-9]\d?)>")


def is_numbered(name: str) -> bool:
    """Whether a field of this name has a numbered picture."""
    return _FIELD.fullmatch(name) is not None


def numbered_pictures(raw: dict) -> dict[int, Any]:
    """The pictures of a record that has them in numbered fields, by their numbers in ascending order."""
    found = {int(name.removeprefix("image_")): value for name, value in raw.items() if is_numbered(name)}
    return {number: found[number] for number in sorted(found) if found[number] not in (None, "")}


def has_numbered_mark(text: str) -> bool:
    """Whether a text has a mark such as <image 1>."""
    return _MARK.search(text) is not None


def in_order(said: Any, pictures: dict[int, Any]) -> tuple[Any, list]:
    """The text or conversation with plain marks, and the pictures in the order of these.

    Pictures that no mark names come first, and so do all where there are no numbered marks. Answers have no marks.
    Raises ValueError if a mark names a picture that is not there.
    """
    turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
    asked = lambda turn: turn.get("role") != "assistant" and isinstance(turn.get("content"), str)
    named = [int(number) for turn in turns if asked(turn) for number in _MARK.findall(turn["content"])]
    if not named:
        return said, list(pictures.values())
    if missing := [number for number in named if number not in pictures]:
        raise ValueError(f"<image {missing[0]}> names a picture, but image_{missing[0]} has none")
    first = [number for number in pictures if number not in named]
    turns = [turn | {"content": _MARK.sub("<image>", turn["content"])} if asked(turn) else turn for turn in turns]
    place = next(place for place, turn in enumerate(turns) if asked(turn) and turn.get("role") != "system")
    turns[place] = turns[place] | {"content": "<image>" * len(first) + turns[place]["content"]}
    return turns[0]["content"] if isinstance(said, str) else turns, [pictures[number] for number in (*first, *named)]
