"""The page of `megavlm plan --page`, a single file: memory, time, operators and traffic of a layout, and a search."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.number_format import number, percent, short
from megavlm.charts.axis import Axis
from megavlm.charts.points import Line, Point, scatter
from megavlm.charts.shares import shares_bar
from megavlm.charts.timeline import COLORS as SPAN_COLORS
from megavlm.charts.timeline import timeline
from megavlm.config.settings import Settings
from megavlm.report.page import render_page
from megavlm.report.plan_memory import GIB, memory_bars, memory_parts, phase_bars
from megavlm.report.plan_workers import workers_told

TEMPLATE = "plan.html.jinja"
BEST = 10  # number of layouts in the table
LONGEST = 12  # number of operators in the table
_NAMED = 3  # number of layouts that are named in the picture
_WIDEST = 1.6  # memory up to which layouts have a place of their own in the picture, as a share of the GPU's
_PART_COLORS = {**SPAN_COLORS, "decoder": "language", "bubble": "faint", "traffic": "sampling", "data": "bad"}
_KINDS = {"product": "language", "attention": "projector"}


def check_new_file(file: Path) -> None:
    """Raises UserError if a page cannot be written to ``file``: it exists already, or its folder does not."""
    if file.exists() or file.is_symlink():
        raise UserError(f"--page: {file} exists already", "move it away, or name another file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--page: the folder {file.absolute().parent} does not exist", "make it, or name another file")


def write_plan_page(file: Path, plan: Mapping[str, Any], settings: Settings, verb: str) -> None:
    """Writes the page atomically.

    Args:
        file: the file to write.
        plan: the JSON form of a plan, as `megavlm plan --json` prints it.
        settings: the settings that were planned.
        verb: the verb that they are for.
    """
    time, search, workers = plan.get("time"), plan.get("candidates") or [], plan.get("workers")
    page = render_page(
        TEMPLATE,
        filters={"gib": _gib, "parts": memory_parts, "changes": layout_text},
        plan=plan,
        title=f"{settings.model.hf.name}, {verb}",
        facts=_facts(settings) | _on_host(plan),
        time=time,
        sampled=plan.get("samples", False),
        memory=memory_bars(plan["stages"], plan["capacity"], plan["spare_share"]),
        phases=[phase_bars(stage, plan["capacity"], plan["spare_share"]) for stage in plan["stages"]],
        timeline=timeline(time["spans"], time["seconds"]) if time else "",
        seconds=_seconds(time["parts"]) if time else "",
        roofline=roofline(time["operators"], plan["gpu"]) if time else "",
        operators=_longest(time["operators"]) if time else [],
        traffic=sorted(time["traffic"].items(), key=lambda item: -item[1]["seconds"]) if time else [],
        workers=workers_told(workers, time["seconds"]) if time and workers else None,
        search=search_chart(search, plan["capacity"], plan["spare_share"]),
        best=[each for each in search if each["ruled_out"] is None][:BEST],
        reasons=ruled_out(search),
        searched=len(search),
    )
    write_text(file, page)


def _facts(settings: Settings) -> dict[str, str]:
    """The settings on which memory and time depend most, by what they are called."""
    parallel, train = settings.parallel, settings.train
    sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    layout = {name: size for name in sizes if (size := getattr(parallel, name) or 1) > 1}
    facts = {
        "layout": layout_text(layout) if layout else "no model parallelism",
        "tokens of a row": f"{settings.data.seq_length:,}",
        "precision": train.precision,
        "recompute": _value(train.recompute) + (", inputs in host memory" if train.offload_activations else ""),
        "recompute in the tower": _value(settings.vision.recompute),
        "window": "the whole step" if settings.vision.window is None else str(settings.vision.window),
        "optimizer": train.optimizer + (", with its state in host memory" if train.offload_optimizer else ""),
    }
    frozen = ", ".join(settings.model.freeze)
    return (
        facts
        | ({"frozen": frozen} if frozen else {})
        | ({"adapter": settings.adapter.type} if settings.adapter.type else {})
    )


def _on_host(plan: Mapping[str, Any]) -> dict[str, str]:
    size = max(stage.get("on_host", 0) for stage in plan["stages"])
    return {"host memory for a GPU": f"{size / GIB:.1f} GiB"} if size else {}


def _seconds(parts: Mapping[str, float]) -> Markup:
    return shares_bar(
        "Seconds of a step", parts, _PART_COLORS, lambda value: f"{number(value)} s", "predicted, of the slowest stage"
    )


def roofline(operators: Sequence[Mapping[str, Any]], gpu: Mapping[str, Any]) -> Markup:
    """The operators of a step in a roofline picture: achieved TFLOP/s against FLOPs per byte; empty without any.

    Operators that compute no products, or move nothing, have no place in it.
    """
    placed = [each for each in operators if each["flops"] > 0 and each["moved"] > 0 and each["seconds"] > 0]
    if not placed:
        return Markup("")
    whole = sum(each["count"] * each["seconds"] for each in operators)
    points = []
    for each in sorted(placed, key=lambda each: -each["count"] * each["seconds"]):
        share, speed = each["count"] * each["seconds"] / whole, each["flops"] / each["seconds"] / 1e12
        density = each["flops"] / each["moved"]
        text = (
            f"{each['count']:,} × {each['name']} of {short(each['flops'])}FLOP: {number(speed, 3)} TFLOP/s, "
            f"{number(density, 3)} FLOPs per byte, {percent(share)} of the seconds"
        )
        points.append(Point(density, speed, text, _KINDS.get(_kind(each), "soft"), 6 + 30 * share**0.5))
    peak, bandwidth = gpu["bf16_tflops"], gpu["memory_bandwidth"]
    corner = peak * 1e3 / bandwidth  # FLOPs per byte from which on products, not memory, are the limit
    x = Axis(min(corner / 10, *(p.x for p in points)), max(corner * 10, *(p.x for p in points)), log=True, across=True)
    y = Axis(min(peak / 20, *(p.y for p in points)), peak, log=True)
    roof = [(x.low, x.low * bandwidth / 1e3), (corner, peak), (x.high, peak)]
    if roof[0][1] < y.low:  # the roof enters the picture at its lower edge
        roof[0] = (y.low * 1e3 / bandwidth, y.low)
    kinds = {kind: _KINDS.get(kind, "soft") for kind in dict.fromkeys(map(_kind, placed))}
    name = f"{peak:g} TFLOP/s, {bandwidth:g} GB/s"
    return scatter(
        "Roofline", points, x, y, units=("FLOPs per byte", "TFLOP/s"), kinds=kinds, lines=[Line(name, roof, "bad")]
    )


def _longest(operators: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The operators that take longest, with their seconds in a step and their share of all operators' seconds."""
    whole = sum(each["count"] * each["seconds"] for each in operators)
    found = [{**each, "whole": each["count"] * each["seconds"]} for each in operators]
    found = sorted(found, key=lambda each: -each["whole"])[:LONGEST]
    return [each | {"share": each["whole"] / whole} for each in found]


def _kind(operator: Mapping[str, Any]) -> str:
    """The first word of its name, such as "product"."""
    return re.split(r"\W", operator["name"], maxsplit=1)[0]


def search_chart(candidates: Sequence[Mapping[str, Any]], capacity: int, spare: float) -> Markup:
    """The layouts of a search: tokens per second and GPU against memory; empty if none has a memory.

    Layouts that were ruled out are grey; those whose speed is not known stand at the bottom.
    """
    known = [each for each in candidates if each["memory"] is not None]
    if not known:
        return Markup("")
    fastest = max((each["tokens_per_second"] or 0.0 for each in known), default=0.0) or 1.0
    widest = min(max(max(each["memory"] for each in known), capacity), _WIDEST * capacity) / GIB
    x, y = Axis(0, widest, across=True), Axis(0, fastest)
    good = [each for each in known if each["ruled_out"] is None]
    points = [_layout_point(each, "soft", 4.0) for each in known if each["ruled_out"] is not None]
    points += [_layout_point(each, "language", 7.0) for each in reversed(good[_NAMED:])]
    points += [
        _layout_point(each, "speed", 11.0, str(place + 1)) for place, each in reversed(list(enumerate(good[:_NAMED])))
    ]
    limits = [
        Line(name, [(at / GIB, 0), (at / GIB, y.high)], color)
        for name, at, color in (
            (f"{percent(spare, 0)} of the memory is left", capacity * (1 - spare), "lr"),
            ("memory of the GPU", capacity, "bad"),
        )
    ]
    kinds = {"the best": "speed", "fits": "language", "ruled out": "soft"}
    return scatter(
        "Layouts",
        points,
        x,
        y,
        units=("GiB on the fullest rank", "tokens per second and GPU"),
        kinds=kinds,
        lines=limits,
    )


def _layout_point(candidate: Mapping[str, Any], color: str, size: float, name: str = "") -> Point:
    speed, memory = candidate["tokens_per_second"], candidate["memory"] / GIB
    text = f"{layout_text(candidate['changes'])}: {memory:.1f} GiB"
    text += f", {short(speed)} tokens/s/GPU" if speed is not None else ""
    text += f" · {candidate['ruled_out']}" if candidate["ruled_out"] else ""
    return Point(memory, speed or 0.0, text, color, size, name)


def layout_text(changes: Mapping[str, Any]) -> str:
    """The settings of a layout in short: "tensor 4 · pipeline 2 · recompute full"."""
    words = [f"{key.rpartition('.')[2].replace('_', ' ')} {_value(value)}" for key, value in changes.items()]
    return " · ".join(words) or "as configured"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return (
        {True: "on", False: "off", None: "none"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def ruled_out(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """What ruled layouts out and how many, the most frequent first. Numbers in a reason are not told apart."""
    reasons = [re.sub(r"\d[\d.,]*", "…", each["ruled_out"]) for each in candidates if each["ruled_out"] is not None]
    return Counter(reasons).most_common()


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
