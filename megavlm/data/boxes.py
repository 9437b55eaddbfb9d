"""Boxes and points in pictures: given in pixels, written into the text as Qwen3-VL knows them, 0 to 1000 a side."""

import math
from dataclasses import dataclass
from typing import Any

from megavlm.base.errors import UserError

MARK = "<box>"


@dataclass(frozen=True)
class Box:
    """``numbers``: (x, y) or (x1, y1, x2, y2) in pixels of the upright picture; ``image``: its number in the sample."""

    numbers: tuple[float, ...]
    image: int

    def written(self, height: int, width: int, source: str) -> str:
        """As text, "[x1, y1, x2, y2]" in thousandths. Raises UserError if it lies outside of the picture."""
        sides = (width, height) * (len(self.numbers) // 2)
        if any(not 0 <= number <= side for number, side in zip(self.numbers, sides, strict=True)):
            raise UserError(
                f"{source}: box {list(self.numbers)} lies outside of picture {self.image}, {width} × {height} pixels",
                "boxes count pixels of the picture as a viewer shows it; numbers from 0 to 1000 already: write them "
                "into the text",
            )
        scaled = (round(1000 * number / side) for number, side in zip(self.numbers, sides, strict=True))
        return f"[{', '.join(map(str, scaled))}]"


def check_box(raw: Any, nearest: int, num_images: int, source: str) -> Box:
    """One entry of a record's ``boxes``: a list of numbers, or ``{"box": …, "image": number from 0}``.

    Args:
        nearest: picture that it belongs to where it does not say so.
        num_images: pictures of the sample.

    Raises:
        UserError: it is neither, or not a box.
    """
    numbers, image = (raw.get("box"), raw.get("image", nearest)) if isinstance(raw, dict) else (raw, nearest)
    if not isinstance(numbers, list) or len(numbers) not in (2, 4) or not all(map(_is_number, numbers)):
        raise UserError(
            f"{source}: a box is a list of 2 or 4 numbers, found {str(raw)[:100]}",
            'write [x, y] or [x1, y1, x2, y2], or {"box": …, "image": number} for another picture than the last one',
        )
    if len(numbers) == 4 and not (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]):
        raise UserError(f"{source}: box {numbers} ends before it begins", "write [left, top, right, bottom]")
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < num_images:
        raise UserError(f"{source}: box {numbers} belongs to picture {image!r}, but there are {num_images}")
    return Box(tuple(numbers), image)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
