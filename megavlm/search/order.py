"""Which layouts a search plans, in which order, and which it leaves out because of those that it has planned."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from megavlm.search.candidate import Candidate

CHUNKS = "parallel.virtual_pipeline"


def rounds(valid: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The layouts in the order in which they are tried: none is in the same round as one of its ``smaller``."""
    found: dict[int, list[dict[str, Any]]] = {}
    for changes in valid:
        found.setdefault(changes["parallel.context"] * changes["parallel.expert"], []).append(changes)
    for size in sorted(found):
        yield found[size]


def smaller(changes: Mapping[str, Any]) -> list[tuple]:
    """The keys of the same layout with less context parallelism, or with a quarter of the expert parallelism or less.

    Where one of these fits, it is faster: it sends less. With few experts on a rank, less of their gradients is
    reduced, so twice the expert parallelism is tried, too.
    """
    context, expert = changes["parallel.context"], changes["parallel.expert"]
    return [
        key_of({**changes, "parallel.context": fewer, "parallel.expert": experts})
        for fewer in range(1, context + 1)
        for experts in range(1, expert + 1)
        if context % fewer == 0 and expert % experts == 0 and (fewer < context or 4 * experts <= expert)
    ]


def key_of(changes: Mapping[str, Any]) -> tuple:
    """What tells plain pipelines apart."""
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor")
    return tuple(changes[f"parallel.{name}"] for name in names)


def is_cut(changes: Mapping[str, Any], valid: Collection[tuple]) -> bool:
    """Whether experts are cut where as many ranks can have whole ones: their products are larger, and less is sent."""
    slices = changes["parallel.expert_tensor"]
    whole = {**changes, "parallel.expert": changes["parallel.expert"] * slices, "parallel.expert_tensor": 1}
    return slices > 1 and key_of(whole) in valid


def least_seconds(planned: Candidate, smaller_bubble: float = 1.0, *, keeps_more: bool = True) -> float:
    """Seconds of a step below which a layout cannot come, told by one that is like it.

    Args:
        planned: that one, planned with all layers computed again.
        smaller_bubble: by how much the bubble may be smaller. It is so with as many chunks of a stage. More context
            parallelism leaves fewer data-parallel ranks, and so more micro-batches to each, which take less time.
        keeps_more: whether the layout may fit with nothing computed again.
    """
    if planned.seconds is None or planned.bubble is None or planned.again is None:
        return float("inf")  # it cannot be built
    seconds = planned.seconds - planned.bubble * (1 - 1 / smaller_bubble)
    return seconds * (1 - planned.again) if keeps_more else seconds
