"""Looks for the fastest layout of a number of GPUs: memory and time are predicted of all that are valid.

Each layout is first planned from few layers, with as much computed again as can be. The fastest that fit are planned
with less of it, and the fastest of these exactly.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from megavlm.base.errors import UserError
from megavlm.base.pools import in_processes, num_cores
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.plan.gpus import Gpu
from megavlm.plan.plan import SPARE, Plan
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import layouts, with_changes

BEST = 10
"""Number of layouts that are planned exactly."""
_GIB = 2**30
_WHAT = "planning layouts"
Progress = Callable[[int, int], None]


class PlanOf(Protocol):
    """Plans these settings; see ``make_plan`` for ``exact``."""

    def __call__(self, own: Settings, *, exact: bool) -> Plan: ...


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
    smallest, *others = _savings(settings)
    work = Rounds(valid, progress, len(valid) + 3 * BEST)

    def roughly(changes: Mapping[str, Any]) -> Plan:
        return plan_of(with_changes(settings, changes), exact=False)

    def tried(number: int) -> Candidate:
        return _fitting(work.now[number], [smallest], roughly)

    planned = list(work.run(tried))
    fitting = sorted((c for c in planned if c.ruled_out is None), key=_seconds)
    promising = fitting[: 2 * BEST]

    def with_less(number: int) -> Candidate:
        one = promising[number]
        least = _fitting(one.changes, others, roughly)
        return least if _seconds(least) < _seconds(one) else one

    faster = _counted(in_processes(with_less, len(promising), num_cores(), _WHAT), len(valid), 3 * BEST, progress)
    fitting = sorted([*faster, *fitting[2 * BEST :]], key=_seconds)
    best = fitting[:BEST]

    def exactly(number: int) -> Candidate:
        return _candidate(best[number].changes, plan_of(with_changes(settings, best[number].changes), exact=True))

    final = _counted(in_processes(exactly, len(best), num_cores(), _WHAT), len(valid) + 2 * BEST, BEST, progress)
    fitting = sorted((c for c in [*final, *fitting[BEST:]] if c.ruled_out is None), key=_seconds)
    return fitting + [c for c in [*final, *planned, *ruled_out] if c.ruled_out is not None]


def _counted(found: Iterable[Candidate], before: int, more: int, progress: Progress) -> list[Candidate]:
    """A list of what is found, while the progress is told."""
    done: list[Candidate] = []
    for candidate in found:
        done.append(candidate)
        progress(before + len(done), before + more)
    return done


class Rounds:
    """Plans layouts in rounds by context parallelism: more of it is not tried where less fits.

    Args:
        valid: the layouts.
        progress: see ``search``.
        of: the number of all layouts that are planned.

    Attributes:
        now: the layouts of this round.
    """

    def __init__(self, valid: Iterable[dict[str, Any]], progress: Progress, of: int):
        self._rounds: dict[int, list[dict[str, Any]]] = {}
        for changes in valid:
            self._rounds.setdefault(changes["parallel.context"], []).append(changes)
        self._progress, self._of = progress, of
        self.now: list[dict[str, Any]] = []

    def run(self, tried: Callable[[int], Candidate]) -> Iterable[Candidate]:
        """Yields the result of ``tried`` for the number of each layout of ``now`` in each round."""
        fits: set[tuple] = set()
        done = 0
        for context in sorted(self._rounds):
            self.now = [changes for changes in self._rounds[context] if _beside_context(changes) not in fits]
            skipped = [changes for changes in self._rounds[context] if _beside_context(changes) in fits]
            done += len(skipped)
            yield from (Candidate(changes, ruled_out="fits with less context parallelism") for changes in skipped)
            for candidate in in_processes(tried, len(self.now), num_cores(), _WHAT):
                done += 1
                self._progress(done, self._of)
                if candidate.ruled_out is None:
                    fits.add(_beside_context(candidate.changes))
                yield candidate


def _beside_context(changes: Mapping[str, Any]) -> tuple:
    names = (name for name in changes if name.startswith("parallel.") and name != "parallel.context")
    return tuple(changes[name] for name in names)


def _savings(settings: Settings) -> list[dict[str, Any]]:
    """Settings that save memory, those that save most first and those that cost no time last."""
    trains_tower = len({"vision", "projector"} - set(settings.frozen(settings.train.steps or 1))) > 0
    tower = [True, False] if trains_tower else [settings.vision.recompute]
    found: list[tuple[Any, bool]] = [
        (recompute, again) for again in tower for recompute in ("full", ["core_attn"], "none")
    ]
    own = settings.train.recompute, settings.vision.recompute
    found += [own] if own not in found else []
    return [{"train.recompute": recompute, "vision.recompute": again} for recompute, again in found]


def _fitting(
    layout: dict[str, Any], savings: list[dict[str, Any]], plan_of: Callable[[dict[str, Any]], Plan]
) -> Candidate:
    """The fastest form of a layout that fits, or the smallest."""
    best: Candidate | None = None
    for saving in savings:
        changes = layout | saving
        try:
            candidate = _candidate(changes, plan_of(changes))
        except UserError as error:
            candidate = Candidate(changes, ruled_out=error.message)
        if best is None or (candidate.ruled_out is None and _seconds(candidate) < _seconds(best)):
            best = candidate
    assert best is not None
    return best


def _candidate(changes: dict[str, Any], plan: Plan) -> Candidate:
    each = plan.world_size * plan.time.seconds
    missing = (SPARE * plan.capacity - plan.spare) / _GIB
    return Candidate(
        changes,
        memory=plan.capacity - plan.spare,
        seconds=plan.time.seconds,
        tokens_per_second=plan.tokens / each,
        mfu=sum(plan.model_flops.values()) / each / (plan.gpu.bf16_tflops * 1e12),
        ruled_out=None if plan.fits else f"needs {missing:.1f} GiB more",
    )


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds if candidate.seconds is not None and candidate.ruled_out is None else float("inf")


def different(candidate: Candidate, settings: Settings) -> Candidate:
    """The candidate with the changes that the settings do not have already."""
    tree = settings.model_dump()

    def is_new(name: str, value: Any) -> bool:
        section, key = name.split(".")
        return bool(tree[section][key] != value)

    return replace(candidate, changes={name: value for name, value in candidate.changes.items() if is_new(name, value)})
