"""Boxes and points in pictures: read in pixels, written into the text in Qwen3-VL's coordinates, 0 to 1000 per side."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.records.values import is_number

MARK = "<box>"
_MARK = re.compile(rf"\\?{MARK}")  # with a backslash before it, the word itself is meant


@dataclass(frozen=True)
class Box:
    """A box or a point.

    Attributes:
        numbers: (x, y) or (x1, y1, x2, y2) in pixels of the upright picture.
        image: the number of the picture in the sample.
    """

    numbers: tuple[float, ...]
    image: int

    def written(self, height: int, width: int, source: str) -> str:
        """The box as text, "[x1, y1, x2, y2]" in thousandths. Raises UserError if it is outside of the picture."""
        sides = (width, height) * (len(self.numbers) // 2)
        if any(not 0 <= number <= side for number, side in zip(self.numbers, sides, strict=True)):
            raise UserError(
                f"{source}: box {list(self.numbers)} is outside of picture {self.image}, which has {width} × {height} "
                "pixels",
                "give boxes in pixels of the picture as a viewer displays it; write boxes that already use 0 to 1000 "
                "into the text itself",
            )
        scaled = (round(1000 * number / side) for number, side in zip(self.numbers, sides, strict=True))
        return f"[{', '.join(map(str, scaled))}]"


def count_marks(text: str) -> int:
    """Number of boxes that a text marks."""
    return sum(found[0] == MARK for found in _MARK.finditer(text))


def fill_marks(text: str, written: Iterator[str]) -> str:
    """The text with the next of the `written` boxes in place of each mark."""
    return _MARK.sub(lambda found: next(written) if found[0] == MARK else MARK, text)


def check_box(raw: Any, nearest: int, num_images: int, source: str) -> Box:
    """Check one entry of a record's ``boxes``: a list of numbers, or ``{"box": …, "image": number from 0}``.

    Args:
        raw: the parsed JSON value.
        nearest: number of the picture to which the box belongs if the entry does not name one.
        num_images: number of pictures of the sample.
        source: "file:line", for error messages.

    Raises:
        UserError: the entry has neither form, or the numbers are not a box.
    """
    numbers, image = (raw.get("box"), raw.get("image", nearest)) if isinstance(raw, dict) else (raw, nearest)
    if not isinstance(numbers, list) or len(numbers) not in (2, 4) or not all(map(is_number, numbers)):
        raise UserError(
            f"{source}: a box must be a list of 2 or 4 numbers, found {quoted(raw)}",
            'write [x, y] or [x1, y1, x2, y2], or {"box": …, "image": number} for a picture other than the one before',
        )
    if len(numbers) == 4 and not (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]):
        raise UserError(
            f"{source}: box {numbers} has its right or bottom side before its left or top side",
            "write [left, top, right, bottom]",
        )
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < num_images:
        raise UserError(
            f"{source}: box {numbers} belongs to picture {quoted(image)}, but the sample has {num_images} pictures"
        )
    return Box(tuple(numbers), image)
