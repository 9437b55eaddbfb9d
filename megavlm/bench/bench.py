"""Measures steps of a configuration on this machine: how long they take, and the memory that one of them needs.

The step is that of training, on the same rows and in the same processes, without checkpoints and an output folder.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megavlm.align.registry import METHODS, make_method
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.data.row_source import HeldRows, MappedRows
from megavlm.monitor.phases import Phases
from megavlm.monitor.stragglers import Stragglers
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.param_groups import ParamGroups
from megavlm.plan.mix import Contents
from megavlm.platform import allocated, device, on_gpu, reset_memory, shutdown, synchronize
from megavlm.platform.collectives import all_gather_objects
from megavlm.runtime.adapter_start import load_start
from megavlm.runtime.feed import Feed
from megavlm.runtime.session import Session, start
from megavlm.tracing.live_memory import LiveMemory
from megavlm.tracing.static_memory import StaticCount
from megavlm.training.method import FileRows, Method, Prepared
from megavlm.training.run import make_step
from megavlm.training.step import Step, StepResult

_FAR = 1_000_000  # the number of a step that lies behind all ramps and in which all parts are unfrozen


@dataclass(frozen=True)
class Measured:
    """What steps took, over all ranks unless stated otherwise.

    Attributes:
        session: the session of the steps.
        seconds: of each measured step, on rank 0.
        counts: sums over the measured steps (``StepResult.counts``).
        phases: mean seconds of a step in each phase (``monitor.phases.PHASES``), on rank 0.
        allocated, reserved: bytes on the rank that needed most: of tensors, and what torch's allocator holds for them;
            None on a CPU.
        one_step: bytes of all tensors in one further step, on the rank that needed most: allocated on a GPU, counted on
            a CPU; None if the method does more in a step than one update.
        rows: the rows of that step on this data-parallel rank, with their pixels on leaders.
    """

    session: Session
    seconds: list[float]
    counts: dict[str, float]
    phases: dict[str, float]
    allocated: int | None
    reserved: int | None
    one_step: int | None = None
    rows: Sequence[Row] = ()


def at_full_size(settings: Settings, *, synthetic: bool) -> Settings:
    """The settings with which steps are measured: those of the end of the run, without an output folder.

    Args:
        settings: the settings of the configuration.
        synthetic: whether weights are random.
    """
    steps = settings.train.steps or _FAR
    train: dict[str, Any] = {"steps": steps, "epochs": None, "schedule_steps": None, "batch_ramp": {}}
    model = {"load": None, "adapter": None} if synthetic else {}
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update=model),
            "data": settings.data.model_copy(update={"length_ramp": {}}),
            "train": settings.train.model_copy(update=train),
            "output": None,
        }
    )


def check(settings: Settings, verb: str, *, synthetic: bool) -> None:
    """Raises UserError if the steps of this verb cannot be measured with these settings."""
    if not METHODS[verb].samples:
        return
    if synthetic:
        raise UserError(
            f"{verb} samples its rows, for which it needs prompts", "set data.train, and leave out --synthetic"
        )
    if settings.rollout.engine == "vllm":
        raise UserError(
            f"rollout.engine is vllm, whose servers need an output folder, and bench of {verb} has none",
            "set rollout.engine to megatron; metrics.jsonl of a run has the times with vllm",
        )


def measure(settings: Settings, verb: str, mix: Contents | None, steps: int, warmup: int) -> Measured:
    """Builds the run of a configuration and measures its steps. Call it on all ranks.

    Args:
        settings: from ``at_full_size``.
        verb: a key of ``METHODS``.
        mix: the contents of the rows; None: rows of ``data.train``.
        steps: number of measured steps.
        warmup: number of steps before them.

    Raises:
        UserError: settings, data or weights do not fit.
    """
    method = make_method(verb, settings)
    session = start(settings, training=True, load=False, score_head=method.scores)
    settings = session.settings
    load_start(settings, session.vlm, session.adapters)
    ParamGroups(session.vlm, settings.train).freeze()
    prepared = _prepared(session, method, verb) if mix is None else Prepared(method.bare_objective(session), None, None)
    optimizers = Optimizers(session.vlm, settings.train, prepared.updates, prepared.idle_steps)
    optimizers.unfreeze(_FAR)
    phases, stragglers = Phases(session.groups.world_host, measured=True), Stragglers(session.groups.world_host)
    source = HeldRows(prepared.rows) if prepared.rows is not None else None
    step, method_step = make_step(session, prepared, optimizers, source, stragglers, phases)
    if mix is not None:
        row = mix.row(settings, session.shapes)
        step.feed = Feed(session.vlm, itertools.repeat(row) if session.groups.is_leader else None)
    try:
        found = _steps(session, method_step or (lambda: step(_FAR)), phases, stragglers, steps, warmup)
        if method_step is None:
            found = _with_one_step(found, step, optimizers)
    finally:
        step.feed.close()
        for used in (source, method_step):
            if used is not None:
                used.close()
    return found


def leave(session: Session) -> None:
    """Ends the process groups, so that this process may plan. Call it on all ranks."""
    dist.barrier(session.groups.world_host)
    shutdown()
    dist.destroy_process_group()


def _prepared(session: Session, method: Method, verb: str) -> Prepared:
    """The method with the rows of ``data.train``.

    A reference model that judges all answers before the first step is left out, because it takes no time in the steps.
    """
    if METHODS[verb].kind in ("pair", "judged") and session.settings.align.reference_at == "start":
        files = FileRows.of(session, METHODS[verb].kind)
        rows = MappedRows(files.loader, _judged) if files.loader is not None else None
        return Prepared(method.bare_objective(session), rows, None, files.loader)
    return method.prepare(session, lambda done: None)


def _judged(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        yield replace(row, annotations=[replace(one, ref_logprob=0.0) for one in row.annotations])


def _steps(
    session: Session,
    step: Callable[[], StepResult],
    phases: Phases,
    stragglers: Stragglers,
    steps: int,
    warmup: int,
) -> Measured:
    counts: Counter[str] = Counter()
    ends: list[float] = []
    for number in range(warmup + steps):
        if number == warmup:
            synchronize()
            phases.fields()  # those of the warm-up
            reset_memory()
            ends.append(time.perf_counter())
        stragglers.start()
        with phases.step():
            result = step()
        if number >= warmup:
            counts.update(result.counts)
            if number == warmup + steps - 1:
                synchronize()
            ends.append(time.perf_counter())
    by_phase = {name.removeprefix("phase/"): seconds for name, seconds in phases.fields().items()}
    tensors, held = (_largest(one, session) for one in allocated())
    return Measured(session, [b - a for a, b in itertools.pairwise(ends)], dict(counts), by_phase, tensors, held)


def _with_one_step(found: Measured, step: Step, optimizers: Optimizers) -> Measured:
    """Runs one more step, whose memory is known for its very rows."""
    session = found.session
    rows = step.rows(step.feed, step.num_micro_batches)
    kept = [row for row in rows.full if row is not None] or rows.hosts
    static = StaticCount()(session.vlm, optimizers).total
    reset_memory()
    with nullcontext() if on_gpu() else LiveMemory(device()) as counted:
        step.gradients(rows)
    peak = allocated()[0] if counted is None else static + counted.peak
    return replace(found, one_step=_largest(peak, session), rows=kept)


def _largest(here: int | None, session: Session) -> int | None:
    """The largest number of all ranks; None if they have none."""
    return max((one for one in all_gather_objects(here, session.groups.world_host) if one is not None), default=None)
