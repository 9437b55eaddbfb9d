"""Line charts and histograms for HTML pages: SVG and HTML that scale to any width, and follow the page's colours.

Lines are drawn in an SVG that is stretched to its box; labels are HTML above it, so that text keeps its size on a
phone. Colours are CSS variables `--NAME` of the page. The page's script reads `data-chart` for the values under the
pointer; without it the charts are still complete.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

from megavlm.base.number_format import number, short
from megavlm.report.loss_plot import smooth

MAX_POINTS = 400  # of a curve; a longer one is thinned
WIDTH, HEIGHT = 1000, 1000  # of the stretched drawing, in its own units


@dataclass(frozen=True)
class Curve:
    """Values over the chart's steps; None where there is none.

    Attributes:
        name: in the legend.
        values: one per step.
        color: name of the page's CSS variable.
        average: drawn over the values, which are then drawn lightly: their moving average.
    """

    name: str
    values: Sequence[float | None]
    color: str
    average: Sequence[float | None] | None = None

    @classmethod
    def smoothed(cls, name: str, values: Sequence[float | None], color: str) -> "Curve":
        """A curve with its moving average."""
        return cls(name, values, color, smooth(values))


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: `start` < x <= `end`."""

    name: str
    start: float
    end: float


def chart(
    title: str,
    steps: Sequence[float],
    curves: Sequence[Curve],
    *,
    log: bool = False,
    from_zero: bool = False,
    bands: Sequence[Band] = (),
    label: Callable[[float], str] = number,
    kind: str = "",
) -> Markup:
    """One chart as HTML.

    Args:
        steps: x of each value, ascending.
        log: logarithmic y axis; values that are not above 0 are left out.
        from_zero: the y axis starts at 0.
        bands: named stretches of the x axis.
        label: text of a y value under the pointer.
        kind: further CSS class, for its height.
    """
    curves = [curve for curve in curves if any(_usable(value, log) for value in curve.values)]
    if not curves:
        return Markup("")
    values = [value for curve in curves for value in curve.values if _usable(value, log)]
    y = _Axis(min(0, *values) if from_zero and not log else min(values), max(values), log)
    left, right = (bands[0].start, bands[-1].end) if bands else (steps[0], steps[-1])
    x = _Axis(left, right if right > left else left + 1, rounded=False)

    lines, shown = [], []
    for curve in curves:
        color = f"var(--{curve.color})"
        if curve.average is not None:
            lines.append(_path(_extremes(steps, curve.values), x, y, color, "raw"))
        points = _means(steps, curve.values if curve.average is None else curve.average)
        lines.append(_path(points, x, y, color, "line"))
        texts = [(step, label(value)) for step, value in points if value is not None]
        shown.append({"name": curve.name, "points": texts})
    grid = [_rule(0, y.at(tick), WIDTH, y.at(tick)) for tick in y.ticks]
    edges = [_rule(x.at(band.start), 0, x.at(band.start), HEIGHT) for band in bands[1:]]
    data = json.dumps({"left": left, "right": x.high, "curves": shown}, ensure_ascii=False)
    return Markup(
        '<figure class="chart {kind}"><figcaption><b>{title}</b>{legend}</figcaption>'
        '<div class="plot" data-chart="{data}">'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{title}">'
        "{drawing}</svg>{labels}</div></figure>"
    ).format(
        kind=kind,
        title=title,
        legend=_legend(curves),
        data=data,
        width=WIDTH,
        height=HEIGHT,
        drawing=Markup("").join([*grid, *edges, *lines]),
        labels=Markup("").join([*_y_labels(y), *_x_labels(x), *_band_labels(bands, x)]),
    )


def histogram(title: str, values: Sequence[int], unit: str, *, color: str = "loss", kind: str = "") -> Markup:
    """How often whole numbers occur: about 20 to 50 bars of equal width, whose bounds are round.

    Args:
        values: from 0 up; without any the chart is empty.
        unit: what they count, for the text of a bar under the pointer.
        color: name of the page's CSS variable.
        kind: further CSS class, for its height.
    """
    if not len(values):
        return Markup("")
    low, high = min(values), max(values)
    most = (high - low + 1) / 50
    size = next(f * 10**power for power in range(19) for f in (1, 2, 5) if f * 10**power >= most)
    first = low // size
    counts = [0] * (high // size - first + 1)
    for value in values:
        counts[value // size - first] += 1
    x, y = _Axis(first * size, (first + len(counts)) * size, rounded=False), _Axis(0, max(counts))
    bars = []
    for place, count in enumerate(counts):
        if count:
            start = (first + place) * size
            bounds = f"{start:,}" if size == 1 else f"{start:,} to {start + size - 1:,}"
            bars.append(
                Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>').format(
                    x.at(start),
                    y.at(count),
                    0.92 * WIDTH / len(counts),
                    y.at(0) - y.at(count),
                    f"{bounds} {unit}: {count:,}",
                )
            )
    y.ticks = [tick for tick in y.ticks if abs(tick - round(tick)) < 1e-9]  # counts are whole
    grid = [_rule(0, y.at(tick), WIDTH, y.at(tick)) for tick in y.ticks]
    return Markup(
        '<figure class="chart {kind}"><figcaption><b>{title}</b></figcaption><div class="plot">'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{title}" '
        'style="fill:var(--{color})">{drawing}</svg>{labels}</div></figure>'
    ).format(
        kind=kind,
        title=title,
        width=WIDTH,
        height=HEIGHT,
        color=color,
        drawing=Markup("").join([*grid, *bars]),
        labels=Markup("").join([*_y_labels(y), *_x_labels(x)]),
    )


class _Axis:
    """Maps values to the drawing: y downwards where it is a value axis (`rounded`), x to the right."""

    def __init__(self, low: float, high: float, log: bool = False, rounded: bool = True):
        self.log, self.rounded = log, rounded
        if rounded and low == high:  # a flat line lies in the middle
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.low, self.high = low, high
        self.ticks = self._log_ticks() if log else self._linear_ticks()
        if rounded and not log:
            spare = (self.high - self.low) * 0.04
            self.low, self.high = self.low - (spare if self.low else 0), self.high + spare
        elif rounded:
            self.low, self.high = self.low / 1.15, self.high * 1.15

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return HEIGHT * (1 - share) if self.rounded else WIDTH * share

    def _linear_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 7  # 4 to 7 ticks
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        if not self.rounded:
            step = max(step, 1)  # steps of training are whole
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


def _usable(value: float | None, log: bool) -> bool:
    return value is not None and (value > 0 or not log)


def _buckets(steps: Sequence[float], values: Sequence[float | None], count: int):
    size = max(math.ceil(len(steps) / count), 1)
    for start in range(0, len(steps), size):
        yield list(zip(steps[start : start + size], values[start : start + size], strict=True))


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _means(steps: Sequence[float], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """About MAX_POINTS points, each the mean of neighbours at the last of their steps. A gap stays one."""
    points: list[tuple[float, float | None]] = []
    for bucket in _buckets(steps, values, MAX_POINTS):
        for is_gap, part in groupby(bucket, key=lambda point: point[1] is None):
            part = list(part)
            points.append((part[-1][0], None if is_gap else sum(value for _, value in part) / len(part)))
    return points


def _extremes(steps: Sequence[float], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """The curve itself, or of a long one the lowest and the highest of each stretch, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return list(zip(steps, values, strict=True))
    points: list[tuple[float, float | None]] = []
    for bucket in _buckets(steps, values, MAX_POINTS // 2):
        for is_gap, part in groupby(bucket, key=lambda point: point[1] is None):
            part = list(part)
            points += part[:1] if is_gap else sorted({min(part, key=_value), max(part, key=_value)})
    return points


def _path(points: list[tuple[float, float | None]], x: _Axis, y: _Axis, color: str, kind: str) -> Markup:
    pieces, pen_up = [], True
    for index, (step, value) in enumerate(points):
        if not _usable(value, y.log):
            pen_up = True
            continue
        pieces.append(f"{'M' if pen_up else 'L'}{x.at(step):.1f} {y.at(value):.1f}")
        if pen_up and (index + 1 == len(points) or not _usable(points[index + 1][1], y.log)):
            pieces.append("h0")  # a single point: round line ends make it a dot
        pen_up = False
    return Markup('<path class="{}" style="stroke:{}" d="{}"/>').format(kind, color, "".join(pieces))


def _rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="grid" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _legend(curves: Sequence[Curve]) -> Markup:
    if len(curves) == 1:
        return Markup("")
    return Markup("").join(
        Markup('<span class="key" style="--color:var(--{})">{}</span>').format(curve.color, curve.name)
        for curve in curves
    )


def _y_labels(y: _Axis) -> list[Markup]:
    return [
        Markup('<span class="y" style="top:{:.2f}%">{}</span>').format(100 * y.at(tick) / HEIGHT, _tick(tick))
        for tick in y.ticks
    ]


def _x_labels(x: _Axis) -> list[Markup]:
    return [
        Markup('<span class="x" style="left:{:.2f}%">{}</span>').format(100 * x.at(tick) / WIDTH, _tick(tick))
        for tick in x.ticks
    ]


def _tick(value: float) -> str:
    """The shortest text: 0.05, 2, 10k, 1e-4."""
    if abs(value) >= 10000:
        return short(value).replace(".00", "").replace(".0", "")
    text = f"{value:.6g}"
    if len(text) <= 6 and "e" not in text:
        return text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _band_labels(bands: Sequence[Band], x: _Axis) -> list[Markup]:
    return [
        Markup('<span class="band" style="left:{:.2f}%;width:{:.2f}%">{}</span>').format(
            100 * x.at(band.start) / WIDTH, 100 * (x.at(band.end) - x.at(band.start)) / WIDTH, escape(band.name)
        )
        for band in bands
    ]
