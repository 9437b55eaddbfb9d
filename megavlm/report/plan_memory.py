"""The memory of a plan's pipeline stages: what its parts are called, and bars beside the memory of the GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from megavlm.base.number_format import percent

GIB = 2**30
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "decoder": ("decoder", "reference", "reduction", "other"),
    "tower": ("tower",),
    "features": ("exchange", "data"),
    "logits": ("head",),
    "sampling": ("sampling",),
    "update": ("optimizer",),
    "saved": ("checkpoint",),
}
"""The parts of what a step makes, and the phases in which it is made (``monitor.phases.PHASES``)."""
COLORS: Mapping[str, str] = {
    "weights": "loss", "gradients": "faint", "optimizer": "lr", "decoder": "language", "tower": "vision",
    "features": "projector", "logits": "sampling", "others": "soft", "sampling": "mark",
    "update": "text", "saved": "good",
}  # fmt: skip


def activation_parts(by_phase: Mapping[str, int]) -> dict[str, int]:
    """The bytes that a step makes by the parts of ``ACTIVATIONS``."""
    return {name: sum(by_phase.get(phase, 0) for phase in phases) for name, phases in ACTIVATIONS.items()}


def memory_parts(stage: Mapping[str, Any]) -> dict[str, int]:
    """All bytes of a stage of a plan's JSON form by part."""
    return {**stage["static"], **activation_parts(stage["peak"]["by_phase"])}


def memory_bars(stages: Sequence[Mapping[str, Any]], capacity: int, spare: float) -> Markup:
    """A bar for each stage at its fullest moment beside the memory of the GPU, as HTML.

    Args:
        stages: the stages of a plan's JSON form.
        capacity: bytes of the GPU's memory.
        spare: share of it that should be left.
    """
    named = [(f"stage {stage['stage']}", stage) for stage in stages]
    return _bars("Memory at the fullest moment, GiB", named, capacity, spare)


def phase_bars(stage: Mapping[str, Any], capacity: int, spare: float) -> Markup:
    """A bar for the fullest moment of each phase on a stage; arguments as for ``memory_bars``."""
    named = [(moment["name"], moment) for moment in stage["moments"]]
    return _bars(f"Memory of stage {stage['stage']}, rank {stage['rank']}, by phase, GiB", named, capacity, spare)


def _bars(title: str, named: Sequence[tuple[str, Mapping[str, Any]]], capacity: int, spare: float) -> Markup:
    """Bars of stages, or of moments of one, with their names."""
    stages = [stage for _, stage in named]
    whole = max(capacity, *(stage["total"] for stage in stages)) * 1.01
    limits = [
        Markup('<i class="limit{}" style="left:{:.3f}%"></i>').format(kind, 100 * at / whole)
        for kind, at in ((" soft-limit", capacity * (1 - spare)), ("", capacity))
    ]
    rows = []
    for name_of_bar, stage in named:
        pieces = [
            Markup('<i style="width:{:.3f}%;background:var(--{})" title="{}"></i>').format(
                100 * size / whole, _color(name), f"{name} {size / GIB:.2f} GiB, {percent(size / capacity)} of the GPU"
            )
            for name, size in memory_parts(stage).items()
            if size > 0
        ]
        over = " over" if stage["total"] > capacity * (1 - spare) else ""
        rows.append(
            Markup(
                '<span class="lane">{}</span><span class="stacked"><span>{}</span>{}</span>'
                '<span class="size{}">{:.1f}</span>'
            ).format(name_of_bar, Markup("").join(pieces), Markup("").join(limits), over, stage["total"] / GIB)
        )
    parts = [memory_parts(stage) for stage in stages]
    used = [name for name in parts[0] if any(of_stage[name] for of_stage in parts)]
    keys = [Markup('<span class="key" style="--color:var(--{})">{}</span>').format(_color(name), name) for name in used]
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b>'
        '<span class="soft">solid line: the {:.1f} GiB of the GPU; dashed: {} is left</span>{}</figcaption>'
        '<div class="stages">{}</div></figure>'
    ).format(title, capacity / GIB, percent(spare, 0), Markup("").join(keys), Markup("").join(rows))


def _color(name: str) -> str:
    return COLORS.get(name, "soft")
