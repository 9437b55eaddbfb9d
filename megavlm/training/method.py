"""The interface of training methods: a method provides an objective and rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader, build_loader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.row_plan import RowPlan
from megavlm.data.row_source import RowSource
from megavlm.monitor.run_monitor import RunMonitor
from megavlm.records.records import Kind
from megavlm.runtime.session import Session
from megavlm.training.memory_check import longest_row
from megavlm.training.objective import Objective
from megavlm.training.step import Step, StepResult


@dataclass(frozen=True)
class Prepared:
    """A method that is ready for its first step.

    Attributes:
        objective: the objective that is minimised.
        rows: the rows to train on, on the leader of each model-parallel group; None on the other ranks.
        longest_row: makes the longest row that the settings allow, for the memory check; on the same ranks as ``rows``.
        loader: the loader behind ``rows``, on the same ranks, if they come from files. It counts their samples.
        make_step: makes what the loop calls for each step, from what updates the weights and the iterator over
            ``rows``; None: each step is one update with the next ``train.global_batch_size`` rows.
        updates: number of updates of the weights in a step.
        others: for each further model of the session that is trained, what updates its weights. The run saves and
            restores these models, too.
        attach: attaches to held-out rows what the method attaches to those of training, on leaders; None: nothing.
        idle_steps: number of steps at the beginning in which the main model is not updated.
    """

    objective: Objective
    rows: RowSource | None
    longest_row: Callable[[], Row] | None
    loader: RowLoader | None = None
    make_step: Callable[[Step, Iterator[Row] | None], "MethodStep"] | None = None
    updates: int = 1
    others: Mapping[str, Step] = field(default_factory=dict)
    attach: Callable[[Iterator[Row]], Iterator[Row]] | None = None
    idle_steps: int = 0


class MethodStep(Protocol):
    """The steps of a method that does more in a step than one update. The loop calls it on all ranks."""

    def __call__(self) -> StepResult:
        """Runs a step."""

    def report(self, step: int, monitor: RunMonitor) -> UserError | None:
        """Shows and records what the last step has done besides its metrics.

        Returns:
            The error with which the run is to end after a checkpoint, the same on all ranks; None to go on.
        """

    def close(self) -> None:
        """Ends processes and frees memory after the last step."""


class Method(Protocol):
    """A training method. ``megavlm.align.registry`` lists all of them."""

    @property
    def title(self) -> str:
        """Heading on the terminal."""

    @property
    def scores(self) -> bool:
        """Whether the model has a reward head."""

    def bare_objective(self, session: Session) -> Objective:
        """Returns the objective without anything that is computed from weights or data beforehand, for a dry run."""

    def bare_others(self, session: Session) -> Mapping[str, Step]:
        """Adds the further models that are trained to the session, without weights, for a dry run.

        Returns what updates them, by name.
        """

    def keeps_start(self, settings: Settings) -> bool:
        """Whether the weights at the start of training are kept, to compare the model with them in each step."""

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        """Prepares the method. It is called on all ranks before the optimizers are built and a checkpoint is restored.

        It may add models to the session, and it may set the main model's weights to those of ``model.load``.

        Args:
            session: the session of the run.
            heartbeat: the method calls it after each sign of progress with a short description of what was done.
        """


class OneModel:
    """A base class of methods that train the main model alone."""

    def keeps_start(self, settings: Settings) -> bool:
        return bool(settings.train.kl_to_start)

    def bare_others(self, session: Session) -> Mapping[str, Step]:
        return {}


@dataclass(frozen=True)
class FileRows:
    """Rows that are read from files.

    Attributes:
        kind: how the records are rendered.
        renderer, loader: on the leader of a model-parallel group; None on the other ranks.
    """

    kind: Kind
    renderer: Renderer | None = None
    loader: RowLoader | None = None

    @classmethod
    def of(cls, session: Session, kind: Kind) -> "FileRows":
        """Opens the rows of ``data.train`` with samples of this kind. Raises UserError as ``build_loader`` does."""
        settings, groups = session.settings, session.groups
        if not groups.is_leader:
            return cls(kind)
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        loader = build_loader(
            settings.data,
            renderer,
            kind,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            seed=settings.train.seed,
            rows_per_step=settings.rows_per_step(groups.dp_size),
            output=settings.output,
            plan=RowPlan.of(settings.train, settings.data),
        )
        return cls(kind, renderer, loader)

    @property
    def longest_row(self) -> Callable[[], Row] | None:
        """See ``Prepared``."""
        return partial(longest_row, self.renderer, self.kind) if self.renderer is not None else None
