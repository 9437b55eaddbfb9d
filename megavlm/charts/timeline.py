"""The timeline of a step: one lane for each pipeline stage, with what the stage does at which time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup

from megavlm.base.number_format import number
from megavlm.charts.axis import WIDTH, Axis

COLORS: Mapping[str, str] = {
    "tower": "vision", "exchange": "lr", "forward": "language", "backward": "projector", "head": "loss",
    "reduction": "sampling", "optimizer": "text",
}  # fmt: skip
MAX_RECTANGLES = 3000  # of all lanes together; more spans are drawn in groups
_EDGED = 5  # units of the width from which on a rectangle has an edge, which would hide narrower ones
_MARGIN, _DIGIT = 0.0035, 0.0077  # shares of the width that a number needs, and each of its digits


@dataclass(frozen=True)
class _Block:
    """What is drawn as one rectangle: one span, or the seconds of one kind in a group of neighbouring spans."""

    name: str
    start: float
    end: float
    first: int | None
    last: int | None


def timeline(spans: Sequence[Mapping[str, Any]], seconds: float) -> Markup:
    """The timeline as HTML; empty if there are no spans.

    Args:
        spans: the spans of ``megavlm.plan.step_time.Span`` as dictionaries.
        seconds: of the whole step.
    """
    lanes = {
        stage: sorted(of_stage, key=lambda span: span["start"])
        for stage, of_stage in groupby(sorted(spans, key=lambda span: span["stage"]), lambda span: span["stage"])
    }
    if not lanes or seconds <= 0:
        return Markup("")
    is_coarse = len(spans) > MAX_RECTANGLES
    # A group holds three kinds or fewer almost everywhere: a micro-batch's forward and backward pass, and one other.
    size = seconds / (MAX_RECTANGLES / len(lanes) / 3)
    rows = []
    for stage, of_stage in lanes.items():
        blocks = list(_grouped(of_stage, size) if is_coarse else map(_block, of_stage))
        rows.append(
            Markup(
                '<span class="lane">stage {}</span><div class="track"><svg viewBox="0 0 {} 10" '
                'preserveAspectRatio="none" role="img" aria-label="stage {}">{}</svg>{}</div>'
            ).format(
                stage,
                WIDTH,
                stage,
                Markup("").join(_rectangle(block, seconds) for block in blocks),
                Markup("").join(_numbers(blocks, seconds)),
            )
        )
    used = {span["name"] for span in spans}
    names = [*(name for name in COLORS if name in used), *sorted(used - COLORS.keys())]
    keys = [Markup('<span class="key" style="--color:var(--{})">{}</span>').format(_color(n), n) for n in names]
    told = Markup("").join(rows)
    note = "numbers are micro-batches" if "number" in told else ""
    note = "too many micro-batches to draw each: groups of them" if is_coarse else note
    axis = Axis(0, seconds, across=True, close=True)
    marks = [
        Markup('<span class="mark" style="left:{:.2f}%">{} s</span>').format(100 * tick / seconds, f"{tick:.4g}")
        for tick in axis.ticks
    ]
    return Markup(
        '<figure class="chart"><figcaption><b>Timeline of a step</b><span class="soft">{}</span>{}</figcaption>'
        '<div class="scroll"><div class="timeline">{}<span></span><div class="marks">{}</div></div></div></figure>'
    ).format(note, Markup("").join(keys), told, Markup("").join(marks))


def _color(name: str) -> str:
    return COLORS.get(name, "soft")


def _block(span: Mapping[str, Any]) -> _Block:
    return _Block(span["name"], span["start"], span["end"], span["micro_batch"], span["micro_batch"])


def _grouped(spans: Sequence[Mapping[str, Any]], size: float) -> Iterator[_Block]:
    """The spans of a stage in groups of up to ``size`` seconds. A group has one block for each kind of span."""
    group: list[Mapping[str, Any]] = []
    for span in spans:
        if group and span["end"] - group[0]["start"] > size:
            yield from _blocks(group)
            group = []
        group.append(span)
    yield from _blocks(group)


def _blocks(group: Sequence[Mapping[str, Any]]) -> Iterator[_Block]:
    """One block for each kind, one after another, each as long as its spans together; the rest of the time is empty."""
    start = group[0]["start"]
    for name in dict.fromkeys(span["name"] for span in group):
        of_name = [span for span in group if span["name"] == name]
        end = start + sum(span["end"] - span["start"] for span in of_name)
        numbers = [span["micro_batch"] for span in of_name if span["micro_batch"] is not None]
        yield _Block(name, start, end, min(numbers, default=None), max(numbers, default=None))
        start = end


def _rectangle(block: _Block, seconds: float) -> Markup:
    which = ""
    if block.first is not None:
        several = block.last != block.first
        which = f" of micro-batch{'es' if several else ''} {block.first}{f' to {block.last}' if several else ''}"
    width = WIDTH * (block.end - block.start) / seconds
    text = f"{block.name}{which}: {number(block.end - block.start)} s from {number(block.start)} s on"
    return Markup(
        '<rect{} x="{:.2f}" y="0" width="{:.2f}" height="10" style="fill:var(--{})"><title>{}</title></rect>'
    ).format(
        Markup(' class="edged"') if width > _EDGED else "",
        WIDTH * block.start / seconds,
        width,
        _color(block.name),
        text,
    )


def _numbers(blocks: Iterable[_Block], seconds: float) -> Iterator[Markup]:
    """The numbers of micro-batches, where there is room for them."""
    for block in blocks:
        if (
            block.first is not None
            and block.first == block.last
            and (block.end - block.start) / seconds >= _MARGIN + _DIGIT * len(str(block.first))
        ):
            middle = 50 * (block.start + block.end) / seconds
            yield Markup('<span class="number" style="left:{:.2f}%">{}</span>').format(middle, block.first)
