"""Which layouts a search plans, in which order, and which it leaves out because of those that it has planned."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from megavlm.search.candidate import Candidate

CHUNKS = "parallel.virtual_pipeline"


def rounds(valid: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The layouts in the order in which they are tried: ``smaller`` and ``halves`` of one are in rounds before it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for changes in valid:
        found.setdefault(changes["parallel.context"] * changes["parallel.expert"], []).append(changes)
    for size in sorted(found):
        yield found[size]


def smaller(changes: Mapping[str, Any]) -> list[tuple]:
    """The keys of the same layout with less context parallelism: where one of these fits, it sends less."""
    context = changes["parallel.context"]
    fewer = [size for size in range(1, context) if context % size == 0]
    return [key_of({**changes, "parallel.context": size}) for size in fewer]


def halves(changes: Mapping[str, Any]) -> list[tuple]:
    """The keys of the same layout with a half and a quarter of the expert parallelism.

    More of it divides the work on weights of experts, and sends more: a doubling saves no more than the one before it.
    """
    expert = changes["parallel.expert"]
    return [key_of({**changes, "parallel.expert": expert // n}) for n in (2, 4) if expert % n == 0]


def key_of(changes: Mapping[str, Any]) -> tuple:
    """What tells plain pipelines apart."""
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor")
    return tuple(changes[f"parallel.{name}"] for name in names)


def is_cut(changes: Mapping[str, Any], valid: Collection[tuple]) -> bool:
    """Whether experts are cut where as many ranks can have whole ones: their products are larger, and less is sent."""
    slices = changes["parallel.expert_tensor"]
    whole = {**changes, "parallel.expert": changes["parallel.expert"] * slices, "parallel.expert_tensor": 1}
    return slices > 1 and key_of(whole) in valid


def least_seconds(
    planned: Candidate, smaller_bubble: float = 1.0, *, decoder: bool = True, tower: bool = False
) -> float:
    """Seconds of a step below which a layout cannot come, told by one that is like it.

    Args:
        planned: that one.
        smaller_bubble: by how much the bubble may be smaller. It is so with as many chunks of a stage. More context
            parallelism leaves fewer data-parallel ranks, and so more micro-batches to each, which take less time.
        decoder, tower: whether the layout may fit with less of these computed again. It saves a forward pass at most.
    """
    if planned.seconds is None or planned.parts is None:
        return float("inf")  # it cannot be built
    parts = planned.parts
    bubble, forward, backward = (parts.get(name, 0.0) for name in ("bubble", "forward", "backward"))
    again = forward if decoder else 0.0  # the pipeline's bubble grows with what is computed in it
    left = (1 - again / max(forward + backward, 1e-9)) / smaller_bubble
    of_tower = parts.get("tower", 0.0) / 2 if tower else 0.0  # "tower" has both passes, and what is computed again
    return planned.seconds - again - bubble * (1 - left) - of_tower
