"""Looks for the fastest layout of a number of GPUs: memory and time are predicted of all that are valid.

Each layout is first planned from few layers, with as much computed again as can be, and without interleaving.
Interleaved pipelines follow where they could be among the fastest. The fastest that fit are planned with less that is
computed again, and the fastest of these exactly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from megavlm.base.errors import UserError
from megavlm.base.pools import in_processes, num_cores
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.plan.gpus import Gpu
from megavlm.plan.plan import SPARE, Plan
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import layouts, with_changes

BEST = 10
"""Number of layouts that are shown."""
PROMISING = 20
"""Number of layouts that are planned with less that is computed again."""
EXACT = 4
"""Number of layouts that are planned exactly."""
_AT_ONCE = 8  # interleaved layouts that are planned before it is asked again which of the others can win
_GIB = 2**30
_CHUNKS = "parallel.virtual_pipeline"
_SMALLER = "fits with less context, expert or expert tensor parallelism"
_SLOW = "too slow with less context parallelism already"
_NOT_INTERLEAVED = "interleaving cannot make it fast enough"
Progress = Callable[[int, int], None]


class PlanOf(Protocol):
    """Plans these settings for the GPUs at hand, or another number of them; see ``make_plan`` for ``exact``."""

    def __call__(self, own: Settings, *, exact: bool, gpus: int | None = None) -> Plan: ...


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
    work = _Work(settings, plan_of, progress, len(valid) + PROMISING)
    work.prepare()

    planned: dict[tuple, Candidate] = {}
    for turn in _rounds(changes for changes in valid if changes[_CHUNKS] is None):
        slowest = _seconds_of_place(planned.values(), PROMISING)
        why = [_why_not(changes, planned, slowest) for changes in turn]
        now = [changes for changes, reason in zip(turn, why, strict=True) if reason is None]
        ruled_out += [Candidate(c, ruled_out=reason) for c, reason in zip(turn, why, strict=True) if reason is not None]
        work.skip(len(turn) - len(now))
        planned |= {_key(one.changes): one for one in work.plan([(changes, [smallest]) for changes in now])}
    tried = list(planned.values())
    hopeful = [(_least_seconds(planned.get(_key(changes)), changes), changes) for changes in valid if changes[_CHUNKS]]
    hopeful.sort(key=lambda one: one[0])
    while hopeful and hopeful[0][0] < _seconds_of_place(tried, PROMISING):
        now, hopeful = [changes for _, changes in hopeful[:_AT_ONCE]], hopeful[_AT_ONCE:]
        tried += work.plan([(changes, [smallest]) for changes in now])
    work.skip(len(hopeful))
    ruled_out += [Candidate(changes, ruled_out=_NOT_INTERLEAVED) for _, changes in hopeful]

    promising, rest = _divided(tried, PROMISING)
    less = work.plan([(one.changes, others) for one in promising])
    faster = [min(pair, key=_seconds) for pair in zip(promising, less, strict=True)]
    best, rest = _divided([*faster, *rest], EXACT)
    final = work.plan([(one.changes, [{}]) for one in best], exact=True)
    fitting = sorted((c for c in [*final, *rest] if c.ruled_out is None), key=_seconds)
    return fitting + [c for c in [*final, *rest, *ruled_out] if c.ruled_out is not None]


class _Work:
    """Plans layouts in several processes.

    Args:
        settings: the settings of the configuration.
        plan_of: plans a layout.
        progress: see ``search``.
        of: about how many layouts will be planned.
    """

    def __init__(self, settings: Settings, plan_of: PlanOf, progress: Progress, of: int):
        self._settings, self._plan_of, self._progress, self._of, self._done = settings, plan_of, progress, of, 0

    def prepare(self) -> None:
        """Plans the configuration itself, so that modules and shapes need not be loaded in each process."""
        torch.set_num_threads(1)  # processes that are forked must not wait for threads that they do not have
        with suppress(UserError):
            self._plan_of(self._settings, exact=False)

    def skip(self, count: int) -> None:
        """Counts layouts that need not be planned."""
        self._done += count
        self._progress(self._done, self._of)

    def plan(
        self, layouts: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]], *, exact: bool = False
    ) -> list[Candidate]:
        """Plans each layout with the first of some further changes with which it fits."""

        def one(number: int) -> Candidate:
            layout, forms = layouts[number]
            return _first_that_fits(layout, forms, lambda changes: self._planned(changes, exact=exact))

        found: list[Candidate] = []
        for candidate in in_processes(one, len(layouts), num_cores(), "planning layouts"):
            found.append(candidate)
            self.skip(1)
        return found

    def _planned(self, changes: Mapping[str, Any], *, exact: bool) -> Plan:
        return self._plan_of(with_changes(self._settings, changes), exact=exact)


def _rounds(valid: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The layouts in the order in which they are tried: none is in the same round as one of its ``_smaller``."""
    rounds: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for changes in valid:
        size = (changes["parallel.context"] * changes["parallel.expert"], changes["parallel.expert_tensor"] > 1)
        rounds.setdefault(size, []).append(changes)
    for size in sorted(rounds):
        yield rounds[size]


def _smaller(changes: Mapping[str, Any]) -> list[tuple]:
    """The keys of the same layout with less context parallelism, or with a quarter of the expert parallelism or less.

    Where one of these fits, it is faster: it sends less. With few experts on a rank, less of their gradients is
    reduced, so twice the expert parallelism is tried, too.
    """
    context, expert = changes["parallel.context"], changes["parallel.expert"]
    return [
        _key({**changes, "parallel.context": fewer, "parallel.expert": experts})
        for fewer in range(1, context + 1)
        for experts in range(1, expert + 1)
        if context % fewer == 0 and expert % experts == 0 and (fewer < context or 4 * experts <= expert)
    ]


def _key(changes: Mapping[str, Any]) -> tuple:
    """What tells plain pipelines apart."""
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor")
    return tuple(changes[f"parallel.{name}"] for name in names)


def _why_not(changes: Mapping[str, Any], planned: Mapping[tuple, Candidate], slowest: float) -> str | None:
    """Why a layout need not be planned, by what has been planned; None if it has to be.

    Args:
        changes: the layout.
        planned: what has been planned, by key.
        slowest: seconds of a step that are too many.
    """
    smaller = [planned[key] for key in _smaller(changes) if key in planned]
    if any(one.ruled_out is None for one in smaller):
        return _SMALLER
    with_less_context = (one for one in smaller if one.changes["parallel.expert"] == changes["parallel.expert"])
    if any(one.seconds is not None and one.seconds > slowest for one in with_less_context):
        return _SLOW
    if changes["parallel.expert_tensor"] > 1:
        whole = planned.get(_key({**changes, "parallel.expert_tensor": 1}))
        if whole is not None and whole.ruled_out is None:
            return _SMALLER
    return None


def _least_seconds(plain: Candidate | None, changes: Mapping[str, Any]) -> float:
    """Seconds of a step below which interleaving cannot bring a layout: all but the bubble stays."""
    if plain is None or plain.ruled_out is not None:
        return float("inf")
    assert plain.seconds is not None
    assert plain.bubble is not None
    return plain.seconds - plain.bubble * (1 - 1 / changes[_CHUNKS])


def _divided(planned: Sequence[Candidate], count: int) -> tuple[list[Candidate], list[Candidate]]:
    """The fastest that fit, and the others."""
    fitting = sorted((candidate for candidate in planned if candidate.ruled_out is None), key=_seconds)
    return fitting[:count], fitting[count:] + [candidate for candidate in planned if candidate.ruled_out is not None]


def _seconds_of_place(planned: Iterable[Candidate], place: int) -> float:
    seconds = sorted(map(_seconds, planned))
    return seconds[place - 1] if len(seconds) >= place else float("inf")


def _savings(settings: Settings) -> list[dict[str, Any]]:
    """Settings that save memory: first those that save most, and then the others, the fastest first."""
    trains_tower = settings.adapter.type is not None or "vision" not in settings.frozen(settings.train.steps or 1)
    tower = [False, True] if trains_tower else [settings.vision.recompute]
    decoder = ["none", ["core_attn"], settings.train.recompute, "full"]
    forms = [{"train.recompute": one, "vision.recompute": again} for one in decoder for again in tower]
    found = [form for place, form in enumerate(forms) if form not in forms[:place]]
    return [found[-1], *found[:-1]]


def _first_that_fits(
    layout: dict[str, Any], forms: Iterable[dict[str, Any]], planned: Callable[[dict[str, Any]], Plan]
) -> Candidate:
    """The first form of a layout that fits, otherwise the last one."""
    found: Candidate | None = None
    for form in forms:
        changes = layout | form
        try:
            found = _candidate(changes, planned(changes))
        except UserError as error:
            found = Candidate(changes, ruled_out=error.message)
        if found.ruled_out is None:
            break
    assert found is not None
    return found


def _candidate(changes: dict[str, Any], plan: Plan) -> Candidate:
    each = plan.world_size * plan.time.seconds
    missing = (SPARE * plan.capacity - plan.spare) / _GIB
    return Candidate(
        changes,
        memory=plan.capacity - plan.spare,
        seconds=plan.time.seconds,
        tokens_per_second=plan.tokens / each,
        bubble=plan.time.parts["bubble"],
        mfu=sum(plan.model_flops.values()) / each / (plan.gpu.bf16_tflops * 1e12),
        ruled_out=None if plan.fits else f"needs {missing:.1f} GiB more",
    )


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds if candidate.seconds is not None and candidate.ruled_out is None else float("inf")


def enough_gpus(
    settings: Settings, shapes: Shapes, gpus: int, gpu: Gpu, plan_of: PlanOf
) -> tuple[int, dict[str, Any]] | None:
    """A number of GPUs with which a layout fits, and its changes: the first of 2, 4, 8 or 16 times ``gpus``.

    For each, the layouts that divide the model over most GPUs are tried. None if none of them fits.
    """
    split = ("tensor", "expert", "pipeline", "context")
    smallest = _savings(settings)[0]
    for many in (gpus * times for times in (2, 4, 8, 16)):
        valid = [changes for changes, why in layouts(settings, shapes, many, gpu) if why is None]
        valid = [changes for changes in valid if changes[_CHUNKS] is None]
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
