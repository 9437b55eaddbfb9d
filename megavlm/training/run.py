"""Builds a training run: the model, its rows, optimizers, checkpoints and the step. An interrupted run is resumed."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megavlm.base.errors import RunFailure, UserError
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader
from megavlm.data.row import Row
from megavlm.data.row_source import HeldRows, RowSource
from megavlm.monitor.hang_watch import collective_minutes
from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.phases import Phases
from megavlm.monitor.profile import Profile
from megavlm.monitor.run_monitor import RunMonitor
from megavlm.monitor.stragglers import Stragglers
from megavlm.optim.group_rules import described
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.param_groups import ParamGroups
from megavlm.output.folder import Start, StartOptions, prepare_output, record_changes
from megavlm.output.inputs import note_inputs
from megavlm.output.lock import RunLock
from megavlm.platform.collectives import on_first_rank
from megavlm.runtime.adapter_start import load_start
from megavlm.runtime.feed import Feed, window_size
from megavlm.runtime.held_out_values import comparable_after
from megavlm.runtime.read_ahead import ReadAhead
from megavlm.runtime.session import Session, start
from megavlm.training.best import Best
from megavlm.training.continuing import remarks_on
from megavlm.training.epochs import expect_steps
from megavlm.training.method import Method, MethodStep, Prepared
from megavlm.training.skipped_steps import weights_failure
from megavlm.training.step import Step, StepResult

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run on this rank, ready for the step after ``first_step``.

    Attributes:
        session: the models and their layout.
        title: heading on the terminal.
        step: updates the weights.
        method_step: the steps of the method, if it does more in a step than one update.
        others: what updates the weights of the further models, by name.
        optimizers: the optimizers of the main model.
        checkpoints: writes the checkpoints of the run.
        rows: the source of the rows, on leaders; None on the other ranks.
        longest_row, loader: see ``Prepared``.
        stragglers: measures which ranks are slow.
        phases: measures where the time of a step goes.
        profile: writes traces of the steps that ``train.profile`` names.
        first_step: number of steps that earlier starts of the run have done.
        attach: see ``Prepared.attach``.
        best: the best value of ``eval.best`` so far.
        remarks: what the user should know about how this start continues an earlier one.
    """

    session: Session
    title: str
    step: Step
    method_step: MethodStep | None
    others: Mapping[str, Step]
    optimizers: Optimizers
    checkpoints: Checkpoints
    rows: RowSource | None
    longest_row: Callable[[], Row] | None
    loader: RowLoader | None
    stragglers: Stragglers
    phases: Phases
    profile: Profile
    first_step: int
    attach: Callable[[Iterator[Row]], Iterator[Row]] | None
    best: Best
    remarks: list[str]

    def take_step(self, number: int, *, is_last: bool) -> StepResult:
        """Runs the next step, which has this number. Weights may be gathered meanwhile: see ``Optimizers.step``."""
        with self.phases.step():
            if self.method_step is not None:
                return self.method_step()
            return self.step(number, is_last=is_last, wait=False)

    def report(self, number: int, monitor: RunMonitor) -> UserError | None:
        """Lets the method report on the step, and returns the error with which it ends the run, if any."""
        return self.method_step.report(number, monitor) if self.method_step is not None else None

    def weights_failure(self) -> RunFailure | None:
        """See ``skipped_steps.weights_failure``; of all models that are trained."""
        found = []
        self.step.optimizers.wait_for_weights()
        for step in (self.step, *self.others.values()):
            with step.awake():
                found.append(weights_failure(step.vlm))
        return next(filter(None, found), None)

    def abandon(self) -> None:
        """Ends what would go on after a run that has failed, such as servers, as far as that is possible."""
        if self.method_step is not None:
            with suppress(Exception):
                self.method_step.close()

    def close(self) -> None:
        """Ends the processes of the run, and writes the trace of a profile that has not come to its last step."""
        self.profile.close()
        self.step.feed.close()
        for used in (self.rows, self.method_step):
            if used is not None:
                used.close()


def build_run(
    settings: Settings, method: Method, lock: RunLock, options: StartOptions, heartbeat: Callable[[str], None]
) -> Run:
    """Builds the run, or resumes the run in the output folder. Call it on all ranks.

    Args:
        settings: the settings of the run.
        method: the training method.
        lock: the lock of the output folder, which is taken.
        options: how to treat a run that is in the output folder already.
        heartbeat: called after each sign of progress with a short description of what was done.

    Raises:
        UserError: on all ranks, if settings, data or checkpoints do not fit, or another process writes into the folder.
        RunFailure: on all ranks, if no checkpoint of the run can be read.
    """
    session = start(settings, training=True, load=False, score_head=method.scores)
    heartbeat("building the model")
    groups, output = session.groups, required(settings.output, "output")
    phases = Phases(groups.world_host, measured=settings.log.phases)
    profile = Profile(settings.train.profile, output, dist.get_rank(), dist.get_world_size(), phases)
    begin, checkpoint = on_first_rank(partial(_prepare, settings, lock, options), groups.world_host)
    for text in on_first_rank(partial(note_inputs, begin.settings, output), groups.world_host):
        if session.is_first:
            _log.warning("%s", text)
    # Those of the session have the adapter section of ``model.adapter``, and config.yaml has not.
    schedule_steps = begin.settings.train.schedule_steps
    train = session.settings.train.model_copy(update={"schedule_steps": schedule_steps})
    settings = session.settings = session.settings.model_copy(update={"train": train})
    origin = None
    if checkpoint is None or session.adapters is not None:  # checkpoints of adapters do not contain frozen weights
        load_start(settings, session.vlm, session.adapters)
        origin = find_checkpoint(settings.model.start) if settings.model.start is not None else None
        heartbeat("loading the weights")
    groups_of_weights = described(settings, session.vlm.shapes, score_head=method.scores)
    ParamGroups(session.vlm, settings.train).freeze()  # before the method looks at what is trained
    prepared = method.prepare(session, heartbeat)
    begin, expected = expect_steps(begin, prepared.loader, groups)
    if settings.train.epochs is not None:
        length = begin.settings.train.schedule_steps
        train = settings.train.model_copy(update={"schedule_steps": length, "steps": length})
        settings = session.settings = settings.model_copy(update={"train": train})
    heartbeat("preparing the method")
    optimizers = Optimizers(session.vlm, settings.train, prepared.updates, prepared.idle_steps)
    trained = {MAIN: TrainedModel(session.vlm, optimizers, session.adapters)}
    for name, other in prepared.others.items():
        trained[name] = TrainedModel(other.vlm, other.optimizers, session.models[name].adapters, other.awake)
    source = HeldRows(prepared.rows) if prepared.rows is not None else None
    checkpoints = Checkpoints(output / "checkpoints", trained, source, settings, origin)
    first_step = checkpoints.restore(checkpoint) if checkpoint else 0
    heartbeat("building the optimizer and restoring the run")
    best, of_best = _best(begin, first_step, checkpoints, groups.world_host)
    remarks = [*groups_of_weights, *expected, *remarks_on(begin, optimizers, first_step), *of_best]
    if checkpoint is not None:
        on_first_rank(partial(record_changes, begin, first_step), groups.world_host)
    stragglers = Stragglers(groups.world_host)
    step, method_step = make_step(session, prepared, optimizers, source, stragglers, phases)
    return Run(
        session,
        method.title,
        step,
        method_step,
        prepared.others,
        optimizers,
        checkpoints,
        prepared.rows,
        prepared.longest_row,
        prepared.loader,
        stragglers,
        phases,
        profile,
        first_step,
        prepared.attach,
        best,
        remarks,
    )


def make_step(
    session: Session,
    prepared: Prepared,
    optimizers: Optimizers,
    source: HeldRows | None,
    stragglers: Stragglers,
    phases: Phases,
) -> tuple[Step, MethodStep | None]:
    """Makes what updates the weights of the main model, and the steps of the method if it does more than one update.

    Args:
        session: the session, with the settings of the run.
        prepared: the method.
        optimizers: the optimizers of the main model.
        source: the rows of ``prepared``, in the state from which they go on; None where it has none.
        stragglers, phases: what measures the steps.
    """
    settings, groups = session.settings, session.groups
    rows = stragglers.rows(iter(source)) if source is not None else None
    patience = collective_minutes(settings.train.hang_minutes)
    is_alone = groups.model_parallel.size() == 1  # then there is no other rank to which rows could be sent
    ahead = None if is_alone or prepared.make_step is not None else ReadAhead(rows, source, groups, patience)

    @contextmanager
    def tower_timer() -> Iterator[None]:
        with stragglers.tower(), phases("tower"):
            yield

    step = Step(
        session.vlm,
        optimizers,
        Feed(session.vlm, rows, ahead),
        settings.rows_per_step(groups.dp_size),
        prepared.objective,
        window_size(settings),
        settings.data.source_names,
        tower_timer,
        phases,
        partial(settings.rows_per_step, groups.dp_size),
    )
    return step, prepared.make_step(step, rows) if prepared.make_step is not None else None


def _best(begin: Start, first_step: int, checkpoints: Checkpoints, world: dist.ProcessGroup) -> tuple[Best, list[str]]:
    """The best value of ``eval.best`` in the steps that earlier starts have done with the held-out data of this one.

    Returns it with what the user should know of the checkpoint that is linked as the best.
    """
    settings, output = begin.settings, required(begin.settings.output, "output")
    metric = settings.eval.best

    def past() -> list[dict[str, float | None]]:
        if metric is None or not first_step:
            return []
        since = comparable_after(output, metric, [(key, first_step) for key in begin.changed])
        wanted = [line for line in read_metrics(output) if metric in line and since < line["step"] <= first_step]
        return [{name: line[name] for name in ("step", metric)} for line in wanted]

    best = Best(settings.eval, on_first_rank(past, world))
    linked, remarks = checkpoints.link(best.step, first_step)
    if best.step is not None and linked != best.step:
        best.forget()
    if metric is not None and best.step is None and linked is not None:
        remarks.append(
            f"checkpoints/best leads to step {linked} until the next evaluation: it was the best by another metric, or "
            "on other held-out data"
        )
    return best, remarks


def _prepare(settings: Settings, lock: RunLock, options: StartOptions) -> tuple[Start, Path | None]:
    """For the first rank: what this start does, and the checkpoint from which it continues."""
    lock.take()
    begin = prepare_output(settings, options)
    if begin.action != "resume":
        return begin, None
    root = required(settings.output, "output") / "checkpoints"
    checkpoint = latest(root)
    if checkpoint is None:
        raise RunFailure(
            f"none of the checkpoints in {root} can be read",
            "start the same command again when they can be read; the warnings above say what is wrong with each",
        )
    return begin, checkpoint
