"""The picture of a step's seconds by phase, for runs with log.phases."""

from collections.abc import Mapping
from statistics import mean

from markupsafe import Markup

from megavlm.base.number_format import number, percent
from megavlm.report.run import Run

_COLORS: Mapping[str, str] = {
    "data": "lr", "sampling": "sampling", "reference": "faint", "tower": "vision", "exchange": "projector",
    "decoder": "language", "head": "loss", "reduction": "speed", "optimizer": "text", "other": "soft",
    "checkpoint": "mark",
}  # fmt: skip
PHASES = tuple(_COLORS)[:-1]  # those of ``monitor.phases``, which imports torch; a report is also written without it


def phases_bar(run: Run) -> Markup:
    """One bar with the mean seconds of each phase, and what checkpoints add between steps; empty without log.phases.

    The first line is left out if there are others, because it includes the start-up.
    """
    lines = [line for line in run.lines if f"phase/{PHASES[0]}" in line]
    lines = lines[1:] or lines
    if not lines:
        return Markup("")
    seconds = {name: mean(line.get(f"phase/{name}") or 0.0 for line in lines) for name in PHASES}
    every = (lines[-1]["step"] - lines[0]["step"]) / (len(lines) - 1) if len(lines) > 1 else 1
    seconds["checkpoint"] = mean(line.get("seconds_checkpoint") or 0.0 for line in lines) / every
    seconds = {name: value for name, value in seconds.items() if value > 0}
    total = sum(seconds.values()) or 1.0
    start, bars, keys = 0.0, [], []
    for name, value in seconds.items():
        width, text = 1000 * value / total, f"{name} {number(value)} s, {percent(value / total, 0)}"
        bars.append(
            Markup(
                '<rect x="{:.2f}" y="0" width="{:.2f}" height="40" style="fill:var(--{})"><title>{}</title></rect>'
            ).format(start, width, _COLORS[name], text)
        )
        keys.append(Markup('<span class="key" style="--color:var(--{})">{}</span> ').format(_COLORS[name], text))
        start += width
    return Markup(
        '<figure class="chart"><figcaption><b>Seconds of a step</b><span class="soft">mean</span></figcaption>'
        '<svg viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" aria-label="Seconds of a step" '
        'style="width:100%;height:40px">{}</svg><p>{}</p></figure>'
    ).format(Markup("").join(bars), Markup("").join(keys))
