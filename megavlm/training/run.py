"""Builds a training run: the model, its rows, optimizers, checkpoints and the step. An interrupted run is resumed."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
from megavlm.config.requirements import required
from megavlm.config.run_folder import prepare_output
from megavlm.config.run_inputs import note_inputs
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader
from megavlm.data.row import Row
from megavlm.data.row_source import RowSource
from megavlm.monitor.stragglers import Stragglers
from megavlm.optim.optimizers import Optimizers
from megavlm.platform.collectives import on_first_rank
from megavlm.runtime.adapter_start import load_start
from megavlm.runtime.feed import Feed
from megavlm.runtime.session import Session, start
from megavlm.training.method import Method
from megavlm.training.step import Step

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run on this rank, ready for the step after ``first_step``.

    Attributes:
        session: the models and their layout.
        title: heading on the terminal.
        step: runs a training step.
        optimizers: the optimizers of the main model.
        checkpoints: writes the checkpoints of the run.
        rows: the source of the rows, on leaders; None on the other ranks.
        longest_row, loader: see ``Prepared``.
        stragglers: measures which ranks are slow.
        first_step: number of steps that earlier starts of the run have done.
        restarted: whether an earlier start of the run left no checkpoint, so that the run begins again.
    """

    session: Session
    title: str
    step: Step
    optimizers: Optimizers
    checkpoints: Checkpoints
    rows: RowSource | None
    longest_row: Callable[[], Row] | None
    loader: RowLoader | None
    stragglers: Stragglers
    first_step: int
    restarted: bool


def build_run(settings: Settings, method: Method, heartbeat: Callable[[str], None]) -> Run:
    """Builds the run, or resumes the run in the output folder. Call it on all ranks.

    Args:
        settings: the settings of the run.
        method: the training method.
        heartbeat: called after each sign of progress with a short description of what was done.

    Raises:
        UserError: on all ranks, if settings, data or checkpoints do not fit.
    """
    session = start(settings, training=True, load=False, score_head=method.scores)
    given, settings = settings, session.settings  # the latter have the adapter section of ``model.adapter``
    heartbeat("building the model")
    groups, output = session.groups, required(settings.output, "output")
    resuming = on_first_rank(lambda: prepare_output(given), groups.world_host)
    for text in on_first_rank(lambda: note_inputs(given, output), groups.world_host):
        if session.is_first:
            _log.warning("%s", text)
    checkpoint = on_first_rank(lambda: latest(output / "checkpoints"), groups.world_host) if resuming else None
    origin = None
    if checkpoint is None or session.adapters is not None:  # checkpoints of adapters do not contain frozen weights
        load_start(settings, session.vlm, session.adapters)
        origin = find_checkpoint(settings.model.start) if settings.model.start is not None else None
        heartbeat("loading the weights")
    prepared = method.prepare(session, heartbeat)
    heartbeat("preparing the method")
    optimizers = Optimizers(session.vlm, settings.train)
    trained = {MAIN: TrainedModel(session.vlm, optimizers, session.adapters)}
    checkpoints = Checkpoints(output / "checkpoints", trained, prepared.rows, settings, origin)
    first_step = checkpoints.restore(checkpoint) if checkpoint else 0
    heartbeat("building the optimizer and restoring the run")
    stragglers = Stragglers(groups.world_host)
    step = Step(
        session.vlm,
        optimizers,
        Feed(session.vlm, stragglers.rows(iter(prepared.rows)) if prepared.rows is not None else None),
        required(settings.train.global_batch_size, "train.global_batch_size") // groups.dp_size,
        prepared.objective,
        settings.vision.window,
        settings.data.source_names,
        stragglers.tower,
    )
    return Run(
        session,
        method.title,
        step,
        optimizers,
        checkpoints,
        prepared.rows,
        prepared.longest_row,
        prepared.loader,
        stragglers,
        first_step,
        restarted=resuming and checkpoint is None,
    )
