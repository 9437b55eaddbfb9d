"""The memory of a plan's pipeline stages: what its parts are called, and bars beside the memory of the GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from megavlm.base.number_format import percent

GIB = 2**30
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "decoder": ("decoder", "reference", "reduction", "optimizer", "other"),
    "tower": ("tower",),
    "features": ("exchange", "data"),
    "logits": ("head",),
    "sampling": ("sampling",),
}
"""The parts of what a step makes, and the phases in which it is made (``monitor.phases.PHASES``)."""
COLORS: Mapping[str, str] = {
    "weights": "loss", "gradients": "faint", "optimizer": "lr", "decoder": "language", "tower": "vision",
    "features": "projector", "logits": "sampling", "others": "soft", "sampling": "mark",
}  # fmt: skip


def activation_parts(by_phase: Mapping[str, int]) -> dict[str, int]:
    """The bytes that a step makes by the parts of ``ACTIVATIONS``."""
    return {name: sum(by_phase.get(phase, 0) for phase in phases) for name, phases in ACTIVATIONS.items()}


def memory_parts(stage: Mapping[str, Any]) -> dict[str, int]:
    """All bytes of a stage of a plan's JSON form by part."""
    return {**stage["static"], **activation_parts(stage["peak"]["by_phase"])}


def memory_bars(stages: Sequence[Mapping[str, Any]], capacity: int, spare: float) -> Markup:
    """A bar for each stage beside the memory of the GPU, as HTML.

    Args:
        stages: the stages of a plan's JSON form.
        capacity: bytes of the GPU's memory.
        spare: share of it that should be left.
    """
    whole = max(capacity, *(stage["total"] for stage in stages)) * 1.01
    limits = [
        Markup('<i class="limit{}" style="left:{:.3f}%"></i>').format(kind, 100 * at / whole)
        for kind, at in ((" soft-limit", capacity * (1 - spare)), ("", capacity))
    ]
    rows = []
    for stage in stages:
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
                '<span class="lane">stage {}</span><span class="stacked"><span>{}</span>{}</span>'
                '<span class="size{}">{:.1f}</span>'
            ).format(stage["stage"], Markup("").join(pieces), Markup("").join(limits), over, stage["total"] / GIB)
        )
    parts = [memory_parts(stage) for stage in stages]
    used = [name for name in parts[0] if any(of_stage[name] for of_stage in parts)]
    keys = [Markup('<span class="key" style="--color:var(--{})">{}</span>').format(_color(name), name) for name in used]
    return Markup(
        '<figure class="chart"><figcaption><b>Memory at the fullest moment, GiB</b>'
        '<span class="soft">solid line: the {:.1f} GiB of the GPU; dashed: {} is left</span>{}</figcaption>'
        '<div class="stages">{}</div></figure>'
    ).format(capacity / GIB, percent(spare, 0), Markup("").join(keys), Markup("").join(rows))


def _color(name: str) -> str:
    return COLORS.get(name, "soft")
