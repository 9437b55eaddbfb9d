"""What the report shows of a mixture of experts: curves of their loads and losses, and a map of layers and experts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.number_format import number
from megavlm.base.quoting import shortened
from megavlm.monitor.expert_metrics import FILE_NAME, loads
from megavlm.report.charts import Curve, chart

_LEVELS = 6  # shades of a colour; the deepest is a load of 8 or more, or of an eighth or less
_PARTS = (("early", "loss"), ("middle", "language"), ("late", "projector"))  # thirds of the layers, colours


def expert_charts(lines: Sequence[dict[str, Any]]) -> list[Markup]:
    """The charts of a run with experts, from its lines of metrics.jsonl; those without values are empty."""
    steps = [line["step"] for line in lines]

    def curve(name: str, field: str, color: str) -> Curve:
        return Curve.smoothed(name, [line.get(f"experts/{field}") for line in lines], color)

    def of_thirds(field: str) -> list[Curve]:
        return [curve(part, f"{field}/{part}", color) for part, color in _PARTS]

    def of_parts(field: str) -> list[Curve]:
        return [curve("all layers", field, "text"), *of_thirds(field)]

    ends = [curve("largest", "load_max", "lr"), curve("smallest", "load_min", "loss")]
    return [
        chart("Load of an expert", steps, ends, log=True, note="1 is even; of all layers"),
        chart("Largest load by layers", steps, of_thirds("load_max"), log=True, note="1 is even"),
        chart("Smallest load by layers", steps, of_thirds("load_min"), log=True, note="1 is even"),
        chart("Evenness of the experts", steps, of_parts("entropy"), note="entropy; 1 is even"),
        chart("Balancing loss", steps, of_parts("aux_loss"), note="before its weight; 1 is even"),
        chart("Router z-loss", steps, of_parts("z_loss"), note="before its weight"),
    ]


def expert_map(folder: Path) -> Markup:
    """The load of each expert in each layer of the newest logged step; empty if the folder has none.

    Raises UserError if its file is damaged.
    """
    try:
        return _drawn(parse_json((folder / FILE_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Markup("")
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{folder / FILE_NAME} cannot be read: {shortened(repr(error))}", "delete it") from None


def _drawn(found: dict[str, Any]) -> Markup:
    layers, by_layer = found["layers"], [loads(tokens) for tokens in found["tokens"]]
    width, height = len(by_layer[0]), len(by_layer)
    shades: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row, values in enumerate(by_layer):
        for column, value in enumerate(values):
            if (shade := _shade(value)) is not None:
                shades[shade].append(f"M{column} {row}h1v1h-1z")
    drawing = [
        Markup('<path style="fill:var(--{});opacity:{:.2f}" d="{}"/>').format(color, level / _LEVELS, "".join(cells))
        for (color, level), cells in sorted(shades.items())
    ]
    places = [
        (value, layers[row], expert) for row, values in enumerate(by_layer) for expert, value in enumerate(values)
    ]
    most, least = max(places), min(places)
    text = (
        f"Step {found['step']}; each row is a layer, {layers[0]} at the top to {layers[-1]}, each column an expert. "
        f"Largest: expert {most[2]} of layer {most[1]}, {number(most[0], 3)} times an even load; smallest: expert "
        f"{least[2]} of layer {least[1]}, {number(least[0], 3)} times."
    )
    keys = (("lr", "more than even"), ("loss", "less than even"))
    return Markup(
        '<figure class="chart" style="grid-column:1/-1"><figcaption><b>Load of each expert</b>{legend}</figcaption>'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" shape-rendering="crispEdges" role="img" '
        'aria-label="Load of each expert" style="width:100%;height:{pixels}px;border:1px solid var(--rule)">'
        '{drawing}</svg><p class="soft small">{text}</p></figure>'
    ).format(
        legend=Markup("").join(
            Markup('<span class="key" style="--color:var(--{})">{}</span>').format(*k) for k in keys
        ),
        width=width,
        height=height,
        pixels=min(max(6 * height, 60), 300),
        drawing=Markup("").join(drawing),
        text=text,
    )


def _shade(load: float) -> tuple[str, int] | None:
    """The colour of a load and its depth; None if it is nearly even."""
    far = max(min(math.log2(load), 3.0), -3.0) if load > 0 else -3.0
    level = round(abs(far) / 3 * _LEVELS)
    return ("lr" if far > 0 else "loss", level) if level else None
