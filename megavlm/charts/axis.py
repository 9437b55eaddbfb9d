"""The axes of charts: where a value is drawn, round values to mark, and their labels.

A chart is an SVG of ``WIDTH`` × ``HEIGHT`` units that is stretched to its box. Labels are HTML elements above it, so
that text keeps its size on a phone.
"""

import math

from markupsafe import Markup

from megavlm.base.number_format import short

WIDTH, HEIGHT = 1000, 1000  # size of the drawing in its own units, before it is stretched


class Axis:
    """Maps values to positions in the drawing.

    Args:
        low, high: the smallest and the largest value.
        log: whether the axis is logarithmic; then all values are positive.
        across: whether it is the x axis, on which larger values stand further to the right, not higher.
        close: whether the drawing ends at ``low`` and ``high``, without some space beyond them.
        whole: whether values are whole numbers, such as steps.

    Attributes:
        low, high: the values at the ends of the drawing.
        ticks: round values to mark.
        across: see the argument.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        log: bool = False,
        across: bool = False,
        close: bool = False,
        whole: bool = False,
    ):
        self.log, self.across = log, across
        if not close and low == high:  # a constant is drawn in the middle
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.low, self.high = low, high
        self.ticks = self._log_ticks() if log else self._linear_ticks(whole)
        if not close and log:
            self.low, self.high = self.low / 1.15, self.high * 1.15
        elif not close:
            spare = (self.high - self.low) * 0.04
            self.low, self.high = self.low - (spare if self.low else 0), self.high + spare

    def at(self, value: float) -> float:
        """The position of a value in the drawing."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return WIDTH * share if self.across else HEIGHT * (1 - share)

    def _linear_ticks(self, whole: bool) -> list[float]:
        rough = (self.high - self.low) / 7  # 4 to 7 ticks
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        if whole:
            step = max(step, 1)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            ticks = [factor * 10.0**decade for decade in decades for factor in factors]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                break
        return ticks[:: math.ceil(len(ticks) / 6)] if ticks else [math.sqrt(self.low * self.high)]


def rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    """A straight line between two points of the drawing."""
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def labels(axis: Axis) -> list[Markup]:
    """The labels of an axis at its ticks."""
    form = (
        '<span class="x" style="left:{:.2f}%">{}</span>'
        if axis.across
        else '<span class="y" style="top:{:.2f}%">{}</span>'
    )
    size = WIDTH if axis.across else HEIGHT
    # If one tick is written as 5e-5 or 10k, then others of such a size are, too: 1e-4 and not 0.0001, 5k and not 5000.
    small = any(len(f"{tick:.6g}") > 6 or "e" in f"{tick:.6g}" for tick in axis.ticks if abs(tick) < 1e-3)
    large = any(abs(tick) >= 10000 for tick in axis.ticks)
    return [Markup(form).format(100 * axis.at(tick) / size, _tick(tick, small, large)) for tick in axis.ticks]


def _tick(value: float, small: bool, large: bool) -> str:
    """The shortest text of a value: 0.05, 2, 10k, 1e-4. ``small`` and ``large``: whether others have such a form."""
    if abs(value) >= (1000 if large else 10000):
        return short(value).replace(".00", "").replace(".0", "")
    text = f"{value:.6g}"
    if len(text) <= 6 and "e" not in text and not (small and 0 < abs(value) < 1e-3):
        return text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
