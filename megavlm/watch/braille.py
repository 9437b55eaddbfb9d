"""Curves as text: each character is a pattern of 2 × 4 Braille dots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from megavlm.base.number_format import number

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a character
_LABEL = 9  # columns for the values beside a plot


@dataclass(frozen=True)
class Line:
    """A curve: values over ascending steps, both of the same length, and its colour in rich's words."""

    steps: Sequence[int]
    values: Sequence[float]
    style: str


def plot(title: str, lines: Sequence[Line], width: int, height: int, *, is_log: bool = False) -> Text:
    """Curves in one picture with a title above, values to the left and steps below.

    Args:
        title: the title.
        lines: the curves; those without points are left out. A later curve is drawn over the earlier ones.
        width, height: size of the whole text in characters; at least 20 × 5 are used.
        is_log: whether the scale is logarithmic, if all values are positive.
    """
    lines = [line for line in lines if line.steps]
    columns, rows = max(width, 20) - _LABEL, max(height, 5) - 2
    text = Text(title, style="bold", no_wrap=True, overflow="crop")
    if not lines:
        return text.append("\n no values yet", style="dim")
    values = [value for line in lines for value in line.values]
    low, high = min(values), max(values)
    is_log = is_log and low > 0
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    scale = _Scale(low, high, 4 * rows, is_log)
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for line in lines:
        _draw(line, cells, 2 * columns, scale, first, last)
    ticks = {0: high, rows // 2: scale.value((rows - 1 - rows // 2) * 4 + 1.5), rows - 1: low}
    for row in range(rows):
        label = number(ticks[row], 3) if row in ticks and (low < high or row == rows // 2) else ""
        text.append(f"\n{label[: _LABEL - 2]:>{_LABEL - 2}} ", style="dim").append("│", style="dim")
        for column in range(columns):
            dots, style = cells.get((row, column), (0, ""))
            text.append(chr(0x2800 + dots) if dots else " ", style=style)
    left, right = f"{first}", f"step {last}"
    return text.append(f"\n{'':{_LABEL}}{left}{right:>{columns - len(left)}}", style="dim")


class _Scale:
    """Maps values to rows of dots, counted from below, and back."""

    def __init__(self, low: float, high: float, dots: int, is_log: bool) -> None:
        self._low, self._high, self.dots, self._is_log = low, high, dots, is_log

    def row(self, value: float) -> int:
        if self._low == self._high:
            return self.dots // 2
        if self._is_log:
            share = math.log(value / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return round(share * (self.dots - 1))

    def value(self, row: float) -> float:
        share = row / (self.dots - 1)
        if self._is_log:
            return self._low * (self._high / self._low) ** share
        return self._low + (self._high - self._low) * share


def _draw(
    line: Line, cells: dict[tuple[int, int], tuple[int, str]], width: int, scale: _Scale, first: int, last: int
) -> None:
    """Adds the dots of a curve to the cells, (row, column) → (pattern, style). Its points are joined."""
    points = [
        (round((step - first) / max(last - first, 1) * (width - 1)), scale.row(value))
        for step, value in zip(line.steps, line.values, strict=True)
    ]
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[-1]], strict=True):
        pieces = max(abs(x1 - x0), abs(y1 - y0), 1)
        for piece in range(pieces + 1):
            x, up = round(x0 + (x1 - x0) * piece / pieces), round(y0 + (y1 - y0) * piece / pieces)
            y = scale.dots - 1 - up
            place = y // 4, x // 2
            cells[place] = cells.get(place, (0, ""))[0] | _DOTS[y % 4][x % 2], line.style
