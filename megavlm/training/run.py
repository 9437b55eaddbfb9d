"""A training run is built here: the model, its rows, optimizers, checkpoints and the step, resumed where it stopped."""

from collections.abc import Callable
from dataclasses import dataclass

from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
from megavlm.config.requirements import required
from megavlm.config.run_folder import prepare_output
from megavlm.config.settings import Settings
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


@dataclass
class Run:
    """A training run on this rank, ready for the step after ``first_step``.

    Attributes:
        session: the models and their layout.
        title: heading on the terminal.
        optimizers: of the main model.
        rows: where rows come from, on ranks that read them.
        longest_row: see ``Prepared``.
        first_step: steps that an earlier start of the run has done.
        restarted: an earlier start of the run left no checkpoint, so that it begins again.
    """

    session: Session
    title: str
    step: Step
    optimizers: Optimizers
    checkpoints: Checkpoints
    rows: RowSource | None
    longest_row: Callable[[], Row] | None
    stragglers: Stragglers
    first_step: int
    restarted: bool


def build_run(settings: Settings, method: Method, heartbeat: Callable[[str], None]) -> Run:
    """Builds the run, or continues the one in the output folder. Call it on all ranks.

    Args:
        heartbeat: called with what has just been done.

    Raises:
        UserError: settings, data or checkpoints that do not fit, on all ranks.
    """
    session = start(settings, training=True, load=False, score_head=method.scores)
    given, settings = settings, session.settings  # the latter with the section that ``model.adapter`` is of
    heartbeat("building the model")
    groups, output = session.groups, required(settings.output, "output")
    resuming = on_first_rank(lambda: prepare_output(given), groups.world_host)
    checkpoint = on_first_rank(lambda: latest(output / "checkpoints"), groups.world_host) if resuming else None
    origin = None
    if checkpoint is None or session.adapters is not None:  # a checkpoint with adapters lacks the frozen weights
        load_start(settings, session.vlm, session.adapters)
        origin = find_checkpoint(settings.model.load) if settings.model.load is not None else None
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
        stragglers,
        first_step,
        restarted=resuming and checkpoint is None,
    )
