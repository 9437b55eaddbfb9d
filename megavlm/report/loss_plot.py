"""loss.png: the loss, learning rate and gradient norms of one run; below the loss, what its method measures of answers:
accuracy and margin if it compares them, reward and length if it samples them.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.base.atomic_files import atomic_open
from megavlm.monitor.metrics import PARTS, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_NAME = "loss.png"
HELD_OUT = "eval/loss"  # the field of the loss on data.eval
COLORS = {
    "loss": "#2563eb",
    "lr": "#f59e0b",
    "vision": "#0d9488",
    "projector": "#db2777",
    "language": "#7c3aed",
    "accuracy": "#059669",
    "margin": "#7c3aed",
    "reward": "#059669",
    "answer_tokens": "#7c3aed",
}
# The fields of a panel below the loss, on its left and its right axis: of methods that compare answers, and of
# reinforcement learning.
_PANELS = (("accuracy", "margin"), ("reward", "answer_tokens"))
_LABELS = {"accuracy": "accuracy, %", "answer_tokens": "answer tokens"}


def smooth(values: Sequence[float | None], reach: int | None = None) -> list[float | None]:
    """The mean of each value and up to `reach` values before and after it; None stays None.

    The window is symmetric, so that the average does not lag behind a falling loss; near the start it is shortened on
    both sides. At the end, the average uses the last values. The default of `reach` is a thirtieth of the run, at most
    100.
    """
    reach = min(len(values) // 30, 100) if reach is None else reach
    sums = [0.0, *accumulate(value or 0.0 for value in values)]
    counts = [0, *accumulate(value is not None for value in values)]
    means: list[float | None] = []
    for place, value in enumerate(values):
        start, end = max(place - reach, 0), min(place + min(reach, place) + 1, len(values))
        means.append(None if value is None else (sums[end] - sums[start]) / (counts[end] - counts[start]))
    return means


def write_loss_plot(output_dir: str | Path, title: str | None = None) -> Path | None:
    """Draws loss and learning rate above gradient norms, from metrics.jsonl of an output folder.

    For dpo, kto and rm, accuracy and margin are drawn between them; for reinforcement learning, reward and length.

    Returns:
        The file, which is replaced atomically; None if there are no metrics.
    """
    lines = read_metrics(output_dir)
    if not lines:
        return None
    path = Path(output_dir) / FILE_NAME
    save_loss_plot(lines, path, title or path.absolute().parent.name)
    return path


def save_loss_plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the same from lines of metrics.jsonl, of which there is at least one, into the file ``path``."""
    figure = _draw(lines, title)
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _draw(lines: list[dict[str, Any]], title: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported only here, because it takes half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [fields for fields in _PANELS if any(line.get(fields[0]) is not None for line in lines)]
    figure = Figure(figsize=(9, 6.2 + 2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)  # uses neither a display nor pyplot's global state
    heights = [2, *(1 for _ in panels), 1]
    loss_axes, *between, norm_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    steps = [line["step"] for line in lines]

    def column(name: str) -> list[float]:
        values = [line.get(name) for line in lines]
        return [float("nan") if value is None else value for value in values]

    def average(name: str) -> list[float]:
        values = smooth([line.get(name) for line in lines])
        return [float("nan") if value is None else value for value in values]

    is_single = sum(line.get("loss") is not None for line in lines) == 1
    marker = "o" if is_single else None  # a single point is not visible as a line
    smoothed = average("loss")
    loss_axes.plot(steps, column("loss"), color=COLORS["loss"], alpha=0.3, linewidth=1, marker=marker)
    loss_axes.plot(steps, smoothed, color=COLORS["loss"], linewidth=2, label="loss (smoothed)")
    if evaluated := [line for line in lines if line.get(HELD_OUT) is not None]:
        values = [line[HELD_OUT] for line in evaluated]
        at = [line["step"] for line in evaluated]
        loss_axes.plot(at, values, color=COLORS["accuracy"], linewidth=1.6, marker=".", label="held-out loss")
    loss_axes.set_ylabel("loss", color=COLORS["loss"])
    if known := [value for value in smoothed if value == value]:
        loss_axes.set_title(f"loss {known[-1]:.4g} after step {steps[-1]}", loc="right", fontsize=10, color="#6b7280")
    loss_axes.set_title(title, loc="left", fontsize=12, fontweight="bold")

    lr_axes = loss_axes.twinx()
    lr_axes.plot(steps, column("lr"), color=COLORS["lr"], linewidth=1.2, linestyle=(0, (4, 2)), label="learning rate")
    lr_axes.set_ylabel("learning rate", color=COLORS["lr"])
    lr_axes.set_ylim(bottom=0)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    handles = [*loss_axes.get_lines()[1:], *lr_axes.get_lines()]
    loss_axes.legend(handles=handles, frameon=False, loc="upper right")

    norm_axes.plot(steps, column("grad_norm"), color="#374151", linewidth=1.4, label="whole")
    for part in PARTS:
        norms = column(f"grad_norm/{part}")
        if any(norm > 0 for norm in norms):  # a frozen part has no gradient
            norm_axes.plot(steps, norms, color=COLORS[part], linewidth=1, alpha=0.8, label=part)
    if any(norm > 0 for norm in column("grad_norm")):
        norm_axes.set_yscale("log")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_xlabel("step")
    norm_axes.legend(frameon=False, ncols=4, loc="upper right", fontsize=9)
    norm_axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    twins = [lr_axes]
    for left_axes, fields in zip(between, panels, strict=True):
        twins.append(right_axes := left_axes.twinx())
        for axes, field, width in zip((left_axes, right_axes), fields, (2, 1.4), strict=True):
            label, values = _LABELS.get(field, field), average(field)
            if field == "accuracy":
                values = [100 * value for value in values]
                axes.set_ylim(0, 104)
            axes.plot(steps, values, color=COLORS[field], linewidth=width, marker=marker, label=label)
            axes.set_ylabel(label, color=COLORS[field])
        handles = [*left_axes.get_lines(), *right_axes.get_lines()]
        left_axes.legend(handles=handles, frameon=False, ncols=2, loc="lower right", fontsize=9)

    for axes in (loss_axes, *between, norm_axes, *twins):
        axes.spines[["top"]].set_visible(False)
        axes.margins(x=0.01)
        axes.tick_params(labelsize=9)
    for axes in (loss_axes, *between, norm_axes):
        axes.spines[["right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
    for axes in twins:
        axes.spines[["right", "left", "bottom"]].set_visible(False)
    loss_axes.set_zorder(lr_axes.get_zorder() + 1)  # draw the loss above the learning rate
    loss_axes.patch.set_visible(False)
    return figure
