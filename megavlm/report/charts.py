"""Line charts and histograms for HTML pages, as SVG and HTML that scale to any width and use the page's colours.

Lines are drawn in an SVG that is stretched to its box. Labels are HTML elements above it, so that text keeps its size
on a phone. Colours are the CSS variables `--NAME` of the page. The page's script reads `data-chart` to show the values
under the pointer; the charts are complete without the script.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from markupsafe import Markup

from megavlm.base.number_format import number
from megavlm.charts.axis import HEIGHT, WIDTH, Axis, labels, rule
from megavlm.report.loss_plot import smooth

MAX_POINTS = 400  # maximum number of points of a curve; a longer curve is thinned
_PHONE, _CHARACTER, _LINE = 270, 6.5, 15  # pixels: width of a chart on a phone, of a letter, height of a line of names


@dataclass(frozen=True)
class Curve:
    """Values over the steps of a chart.

    Attributes:
        name: the name in the legend.
        values: one value per step, None if there is no value.
        color: the name of the page's CSS variable.
        average: the moving average of the values. It is drawn as a line over the values, which are then drawn lightly.
        sparse: the values are measured in some steps only, and the line leads from one to the next.
    """

    name: str
    values: Sequence[float | None]
    color: str
    average: Sequence[float | None] | None = None
    sparse: bool = False

    @classmethod
    def smoothed(cls, name: str, values: Sequence[float | None], color: str) -> "Curve":
        """A curve with its moving average."""
        return cls(name, values, color, smooth(values))


@dataclass(frozen=True)
class Band:
    """An interval of the x axis with a name: `start` < x <= `end`."""

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
    note: str = "",
) -> Markup:
    """One chart as HTML; empty if no curve has values.

    Args:
        title: the title.
        steps: the x value of each step, in ascending order.
        curves: the curves.
        log: use a logarithmic y axis; values that are not positive are not drawn.
        from_zero: start the y axis at 0.
        bands: named intervals of the x axis.
        label: formats the y value under the pointer.
        kind: further CSS class, which sets the height.
        note: what the values are, beside the title.
    """
    curves = [curve for curve in curves if any(_usable(value, log) for value in curve.values)]
    if not curves:
        return Markup("")
    values = [value for curve in curves for value in curve.values if value is not None and _usable(value, log)]
    low, high = min(values), max(values)
    if from_zero and not log:
        low, high = min(0, low), high if low or high else 1
    y = Axis(low, high, log=log)
    left, right = (bands[0].start, bands[-1].end) if bands else (steps[0], steps[-1])
    x = Axis(left, right if right > left else left + 1, across=True, close=True, whole=True)

    lines, shown = [], []
    for curve in curves:
        color = f"var(--{curve.color})"
        if curve.average is not None:
            lines.append(_path(_extremes(steps, curve.values), x, y, color, "raw"))
        at, drawn = steps, curve.values if curve.average is None else curve.average
        if curve.sparse:
            at, drawn = zip(
                *((step, value) for step, value in zip(at, drawn, strict=True) if value is not None), strict=True
            )
        points = _means(at, drawn)
        lines.append(_path(points, x, y, color, "line"))
        texts = [(step, label(value)) for step, value in points if value is not None]
        shown.append({"name": curve.name, "points": texts})
    grid = [rule(0, y.at(tick), WIDTH, y.at(tick)) for tick in y.ticks]
    edges = [rule(x.at(band.start), 0, x.at(band.start), HEIGHT) for band in bands[1:]]
    names, lines_of_names = _band_labels(bands, x)
    room = Markup(' style="margin-top:{}px"').format(12 + _LINE * lines_of_names) if names else Markup("")
    data = json.dumps({"left": left, "right": x.high, "curves": shown}, ensure_ascii=False)
    return Markup(
        '<figure class="chart {kind}"><figcaption><b>{title}</b>{note}{legend}</figcaption>'
        '<div class="plot" data-chart="{data}"{room}>'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{title}">'
        "{drawing}</svg>{labels}</div></figure>"
    ).format(
        kind=kind,
        title=title,
        note=Markup('<span class="soft">{}</span>').format(note) if note else "",
        legend=_legend(curves),
        data=data,
        room=room,
        width=WIDTH,
        height=HEIGHT,
        drawing=Markup("").join([*grid, *edges, *lines]),
        labels=Markup("").join([*labels(y), *labels(x), *names]),
    )


def histogram(title: str, values: Sequence[int], unit: str, *, color: str = "loss", kind: str = "") -> Markup:
    """A histogram of whole numbers with about 20 to 50 bars of equal width, which have round bounds.

    Args:
        title: the title.
        values: numbers of at least 0; if there are none, the chart is empty.
        unit: the unit of the values, for the text of a bar under the pointer.
        color: the name of the page's CSS variable.
        kind: further CSS class, which sets the height.
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
    x = Axis(first * size, (first + len(counts)) * size, across=True, close=True, whole=True)
    y = Axis(0, max(counts), whole=True)
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
    grid = [rule(0, y.at(tick), WIDTH, y.at(tick)) for tick in y.ticks]
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
        labels=Markup("").join([*labels(y), *labels(x)]),
    )


def _usable(value: float | None, log: bool) -> bool:
    """Whether a value can be drawn."""
    return value is not None and (value > 0 or not log)


def _buckets(
    steps: Sequence[float], values: Sequence[float | None], count: int
) -> Iterator[list[tuple[float, float | None]]]:
    """The points (step, value) in up to `count` groups of consecutive points."""
    size = max(math.ceil(len(steps) / count), 1)
    for start in range(0, len(steps), size):
        yield list(zip(steps[start : start + size], values[start : start + size], strict=True))


def _means(steps: Sequence[float], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """About MAX_POINTS points. Each is the mean of consecutive points, at their last step. Gaps are kept."""
    points: list[tuple[float, float | None]] = []
    for bucket in _buckets(steps, values, MAX_POINTS):
        for _, group in groupby(bucket, key=lambda point: point[1] is None):
            part = list(group)
            known = [value for _, value in part if value is not None]
            points.append((part[-1][0], sum(known) / len(part) if known else None))
    return points


def _extremes(steps: Sequence[float], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """All points or, for a long curve, the lowest and the highest of consecutive points, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return list(zip(steps, values, strict=True))
    points: list[tuple[float, float | None]] = []
    for bucket in _buckets(steps, values, MAX_POINTS // 2):
        for _, group in groupby(bucket, key=lambda point: point[1] is None):
            part = list(group)
            known = [(step, value) for step, value in part if value is not None]
            points += sorted({min(known, key=itemgetter(1)), max(known, key=itemgetter(1))}) if known else part[:1]
    return points


def _path(points: list[tuple[float, float | None]], x: Axis, y: Axis, color: str, kind: str) -> Markup:
    pieces, pen_up = [], True
    for index, (step, value) in enumerate(points):
        if value is None or not _usable(value, y.log):
            pen_up = True
            continue
        pieces.append(f"{'M' if pen_up else 'L'}{x.at(step):.1f} {y.at(value):.1f}")
        if pen_up and (index + 1 == len(points) or not _usable(points[index + 1][1], y.log)):
            pieces.append("h0")  # a single point, which round line ends draw as a dot
        pen_up = False
    return Markup('<path class="{}" style="stroke:{}" d="{}"/>').format(kind, color, "".join(pieces))


def _legend(curves: Sequence[Curve]) -> Markup:
    if len(curves) == 1:
        return Markup("")
    return Markup("").join(
        Markup('<span class="key" style="--color:var(--{})">{}</span>').format(curve.color, curve.name)
        for curve in curves
    )


def _band_labels(bands: Sequence[Band], x: Axis) -> tuple[list[Markup], int]:
    """The names of bands above the chart, and the number of lines that they take.

    A name begins where its band does and may be longer than the band; at the right edge, it ends there. Names that
    would overlap on a phone stand on different lines.
    """
    names, ends = [], list[float]()  # of each line: where its last name ends, in pixels
    for band in bands:
        start, width = _PHONE * x.at(band.start) / WIDTH, min(_CHARACTER * len(band.name), _PHONE)
        is_inside = start + width <= _PHONE
        left = start if is_inside else _PHONE - width
        line = next((line for line, end in enumerate(ends) if end <= left), len(ends))
        ends[line : line + 1] = [left + width + 2 * _CHARACTER]
        side = f"left:{100 * start / _PHONE:.2f}%" if is_inside else "right:0"
        names.append(
            Markup('<span class="band" style="{};margin-bottom:{}px">{}</span>').format(
                side, 7 + _LINE * line, band.name
            )
        )
    return names, len(ends)
