"""Scatter plots for HTML pages, drawn like the line charts of ``charts.py``. A point under the pointer is explained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from megavlm.charts.axis import HEIGHT, WIDTH, Axis, labels, rule


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        x, y: its place. A place outside of the axes is moved to their nearest end.
        text: what it is.
        color: the name of the page's CSS variable.
        size: its diameter in pixels.
        name: short label beside it; "" for none.
    """

    x: float
    y: float
    text: str
    color: str
    size: float = 7.0
    name: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points with a name, such as a limit. ``name`` stands in the legend."""

    name: str
    places: Sequence[tuple[float, float]]
    color: str


def scatter(
    title: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    units: tuple[str, str],
    kinds: Mapping[str, str],
    lines: Sequence[Line] = (),
) -> Markup:
    """One scatter plot as HTML.

    Args:
        title: the title.
        points: the points; later ones are drawn above earlier ones.
        x, y: the axes.
        units: what the values of both axes are.
        kinds: the legend of the points: what each colour means, by its meaning.
        lines: lines below the points.
    """
    grid = [rule(0, y.at(tick), WIDTH, y.at(tick)) for tick in y.ticks]
    grid += [rule(x.at(tick), 0, x.at(tick), HEIGHT) for tick in x.ticks]
    drawn = [_line(line, x, y) for line in lines]
    names = []
    for point in points:
        left, top = _within(x.at(point.x)), _within(y.at(point.y))
        drawn.append(
            Markup(
                '<path class="point" style="stroke:var(--{});stroke-width:{:.1f}" d="M{:.1f} {:.1f}h0">'
                "<title>{}</title></path>"
            ).format(point.color, point.size, left, top, point.text)
        )
        if point.name:
            names.append(
                Markup('<span class="name" style="left:{:.2f}%;top:{:.2f}%">{}</span>').format(
                    100 * left / WIDTH, 100 * top / HEIGHT, point.name
                )
            )
    meanings = [*kinds.items(), *((line.name, line.color) for line in lines)]
    keys = [Markup('<span class="key" style="--color:var(--{})">{}</span>').format(at, name) for name, at in meanings]
    return Markup(
        '<figure class="chart large scatter"><figcaption><b>{title}</b><span class="soft">{up} against {across}</span>'
        '{keys}</figcaption><div class="plot">'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{title}">{drawing}</svg>'
        "{labels}</div></figure>"
    ).format(
        title=title,
        up=units[1],
        across=units[0],
        keys=Markup("").join(keys),
        width=WIDTH,
        height=HEIGHT,
        drawing=Markup("").join([*grid, *drawn]),
        labels=Markup("").join([*labels(y), *labels(x), *names]),
    )


def _within(place: float) -> float:
    return min(max(place, 0.0), float(WIDTH))  # the drawing is a square


def _line(line: Line, x: Axis, y: Axis) -> Markup:
    path = "L".join(f"{_within(x.at(at)):.1f} {_within(y.at(up)):.1f}" for at, up in line.places)
    return Markup('<path class="line" style="stroke:var(--{})" d="M{}"/>').format(line.color, path)
