"""Plans layouts in several processes."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, Self

import torch

from megavlm.base.errors import UserError
from megavlm.base.pools import Forked, num_cores
from megavlm.config.settings import Settings
from megavlm.plan.plan import SPARE, Need, Plan
from megavlm.plan.stage import FREE_MEMORY, kernels_on_gpus
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import with_changes

_GIB = 2**30
Progress = Callable[[int, int], None]
Form = dict[str, Any]
"""Settings of what is computed again, by dotted name."""


class PlanOf(Protocol):
    """Plans these settings for the GPUs at hand, or another number of them; see ``make_plan`` for ``exact``."""

    def __call__(self, own: Settings, *, exact: bool, gpus: int | None = None) -> Plan: ...


class _Job(NamedTuple):
    """A layout to be planned with the fastest of some forms with which it fits; see ``make_plan`` for ``exact``."""

    layout: dict[str, Any]
    forms: Sequence[Form]
    exact: bool


class Work:
    """Within the block, plans layouts, one in each process.

    Args:
        settings: the settings of the configuration.
        plan_of: plans a layout.
        progress: is called with the number of layouts that have been planned, and that of all.
        of: about how many layouts will be planned.
    """

    def __init__(self, settings: Settings, plan_of: PlanOf, progress: Progress, of: int):
        self._settings, self._plan_of, self._progress, self._of, self._done = settings, plan_of, progress, of, 0
        self._processes = Forked(self._one, num_cores(), "planning layouts", FREE_MEMORY)

    def __enter__(self) -> Self:
        """Plans the configuration itself, so that modules and shapes need not be loaded in each process."""
        torch.set_num_threads(1)  # processes that are forked must not wait for threads that they do not have
        with suppress(UserError):
            self._plan_of(self._settings, exact=False)
        gc.freeze()  # what is loaded now stays, so the processes need not look through it for garbage
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.__exit__()

    def plan(self, layouts: Sequence[tuple[dict[str, Any], Sequence[Form]]], *, exact: bool = False) -> list[Candidate]:
        """Plans each layout with the fastest of some forms with which it fits."""
        found: list[Candidate] = []
        for candidate in self._processes.map([_Job(*one, exact) for one in layouts]):
            found.append(candidate)
            self._done += 1
            self._progress(min(self._done, self._of), self._of)
        return found

    def _one(self, job: _Job) -> Candidate:
        def planned(changes: Mapping[str, Any]) -> Plan:
            return self._plan_of(with_changes(self._settings, changes), exact=job.exact)

        return _fastest_that_fits(job.layout, job.forms, planned)


def savings(settings: Settings) -> list[Form]:
    """The forms of a layout: first the one that saves most memory, and then the others, the fastest last."""
    trains_tower = settings.adapter.type is not None or "vision" not in settings.frozen(settings.train.steps or 1)
    tower = [True, False] if trains_tower else [settings.vision.recompute]
    own = settings.train.recompute
    attention = [["core_attn"]]  # which Transformer Engine's attention does not keep, so that a run refuses it
    if kernels_on_gpus(settings) == "te":
        attention = []
    if settings.train.offload_activations:  # the inputs of layers that are computed again
        return [{"train.recompute": "full", "vision.recompute": again} for again in tower]
    decoder = ["full", *([own] if own not in ("full", "none", ["core_attn"]) else []), *attention, "none"]
    return [{"train.recompute": one, "vision.recompute": again} for one in decoder for again in tower]


def need_of(form: Form, chunks: int) -> Need:
    """The key of a form in ``Plan.needs``, which lacks some forms."""
    decoder = form["train.recompute"]
    return decoder if isinstance(decoder, str) else ",".join(decoder), form["vision.recompute"], chunks


def _fastest_that_fits(
    layout: dict[str, Any], forms: Iterable[Form], planned: Callable[[dict[str, Any]], Plan]
) -> Candidate:
    """The fastest form of a layout that fits, otherwise the one that needs least memory.

    What keeps more than a form that does not fit is not planned, nor what keeps less than one that does.
    """
    found: list[Candidate] = []
    fits: list[Form] = []
    misfits: list[Form] = []
    for form in forms:
        if any(_keeps_more(form, other) for other in misfits) or any(_keeps_more(other, form) for other in fits):
            continue
        changes = layout | form
        try:
            found.append(_candidate(changes, planned(changes)))
        except UserError as error:
            found.append(Candidate(changes, ruled_out=error.message))
        (fits if found[-1].ruled_out is None else misfits).append(form)
    return min(found, key=lambda one: (seconds_of(one), one.memory or 0))


def _keeps_more(form: Form, other: Form) -> bool:
    """Whether a form keeps all that the other one keeps. Lists of modules are compared with full and none alone."""
    if form["vision.recompute"] and not other["vision.recompute"]:
        return False
    mine, its = form["train.recompute"], other["train.recompute"]
    return mine == its or mine == "none" or its == "full"


def _candidate(changes: dict[str, Any], plan: Plan) -> Candidate:
    each = plan.world_size * plan.time.seconds
    missing = (SPARE * plan.capacity - plan.spare) / _GIB
    return Candidate(
        changes,
        memory=plan.capacity - plan.spare,
        static=max(plan.stages, key=lambda stage: stage.total).static.total,
        seconds=plan.time.seconds,
        tokens_per_second=plan.tokens / each,
        mfu=sum(plan.model_flops.values()) / each / (plan.gpu.bf16_tflops * 1e12),
        ruled_out=None if plan.fits else f"needs {missing:.1f} GiB more",
        parts=plan.time.parts,
        needs=plan.needs,
    )


def seconds_of(candidate: Candidate) -> float:
    """Seconds of a step; infinite if it does not fit, or if they are not known."""
    return candidate.seconds if candidate.seconds is not None and candidate.ruled_out is None else float("inf")
