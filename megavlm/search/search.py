"""Looks for the fastest layout of a number of GPUs: memory and time are predicted of all that are valid.

Each layout is first planned from few layers, with as much computed again as can be, and without interleaving. Then
those follow that may become the fastest, by interleaving or by computing less again, the most hopeful first. The
fastest are planned exactly.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.pools import num_cores
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.plan.gpus import Gpu
from megavlm.plan.plan import SPARE
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import layouts, with_changes
from megavlm.search.order import CHUNKS, is_cut, key_of, rounds
from megavlm.search.queue import Queue
from megavlm.search.work import PlanOf, Progress, Work, savings, seconds_of

BEST = 10
"""Number of layouts that are shown."""
_PROMISING = 20
_CUT = "expert tensor parallelism where whole experts divide as well"
_NOT_FASTEST = "cannot be the fastest, as layouts like it show"


def search(
    settings: Settings,
    shapes: Shapes,
    gpus: int,
    gpu: Gpu,
    plan_of: PlanOf,
    *,
    progress: Progress = lambda done, of: None,
) -> list[Candidate]:
    """All layouts, the fastest first; behind them those that were ruled out.

    Args:
        settings: the settings of the configuration.
        shapes: the model's shapes.
        gpus, gpu: number of GPUs, and which.
        plan_of: plans a layout.
        progress: is called with the number of layouts that have been planned, and that of all.
    """
    found = list(layouts(settings, shapes, gpus, gpu))
    ruled_out = [Candidate(changes, ruled_out=why) for changes, why in found if why is not None]
    valid = [changes for changes, why in found if why is None]
    keys = {key_of(changes) for changes in valid}
    ruled_out += [Candidate(changes, ruled_out=_CUT) for changes in valid if is_cut(changes, keys)]
    valid = [changes for changes in valid if not is_cut(changes, keys)]
    queue = Queue(valid, savings(settings), (1 - SPARE) * gpu.memory_gib * 2**30)
    with Work(settings, plan_of, progress, sum(changes[CHUNKS] is None for changes in valid)) as work:
        for now in rounds(changes for changes in valid if changes[CHUNKS] is None):
            tries = [one for changes in now if (one := queue.first_try(changes, _PROMISING)) is not None]
            queue.take(tries, work.plan([(one.changes, one.forms) for one in tries]))
        while tries := queue.hopeful(2 * num_cores()):
            queue.take(tries, work.plan([(one.changes, one.forms) for one in tries]))
        ruled_out += [Candidate(changes, ruled_out=_NOT_FASTEST) for changes in queue.left()]

        rough = sorted(queue.found.values(), key=seconds_of)
        exact: list[Candidate] = []
        while rough and seconds_of(rough[0]) < min(map(seconds_of, exact), default=float("inf")):
            first, rough = rough[: num_cores()], rough[num_cores() :]
            exact += work.plan([(one.changes, [{}]) for one in first if one.ruled_out is None], exact=True)
    both = sorted([*exact, *rough], key=seconds_of)
    return [c for c in both if c.ruled_out is None] + [c for c in both if c.ruled_out is not None] + ruled_out


def enough_gpus(
    settings: Settings, shapes: Shapes, gpus: int, gpu: Gpu, plan_of: PlanOf
) -> tuple[int, dict[str, Any]] | None:
    """A number of GPUs with which a layout fits, and its changes: the first of 1, 2, 4, 8, … 256 times ``gpus``.

    With as many GPUs as there are, Adam's state and the layers' inputs are in host memory; with more, they are where
    the settings say. For each number, the layouts that divide the model over most GPUs are tried. None if none of them
    fits.
    """
    split = ("tensor", "expert", "pipeline", "context")
    to_host = {} if settings.train.offload_activations else {"train.offload_activations": True}
    if settings.train.can_offload:
        to_host["train.offload_optimizer"] = True
    for many in (gpus * 2**doublings for doublings in range(not to_host, 9)):
        smallest = savings(settings)[0] | (to_host if many == gpus else {})
        valid = [changes for changes, why in layouts(settings, shapes, many, gpu) if why is None]
        valid = [changes for changes in valid if changes[CHUNKS] is None]
        for names in (split, ("context", *split)):
            most = max(valid, key=lambda changes: [changes[f"parallel.{name}"] for name in names], default=None)
            if most is None:
                continue
            with suppress(UserError):
                changes = most | smallest
                if plan_of(with_changes(settings, changes), exact=False, gpus=many).fits:
                    return many, changes
    return None


def different(candidate: Candidate, settings: Settings) -> Candidate:
    """The candidate with the changes that the settings do not have already."""
    tree = settings.model_dump()

    def is_new(name: str, value: Any) -> bool:
        section, key = name.split(".")
        return bool(tree[section][key] != value)

    return replace(candidate, changes={name: value for name, value in candidate.changes.items() if is_new(name, value)})
