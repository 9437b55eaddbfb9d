"""The training method of dpo, kto and rm: its rows, its objective and its reference model."""

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.align.reference import reference_of
from megavlm.align.reference_rows import AnswerData
from megavlm.base.errors import UserError
from megavlm.config.sections import RANDOM
from megavlm.config.settings import Settings
from megavlm.data.row_source import MappedRows, RowSource
from megavlm.records.records import Kind
from megavlm.runtime.session import Session
from megavlm.sources.blend import open_eval_sources
from megavlm.training.method import FileRows, OneModel, Prepared
from megavlm.training.objective import Objective
from megavlm.training.start_weights import StartWeights
from megavlm.workers.fatal_samples import FatalSamples

MakeObjective = Callable[[Settings, ProcessGroupCollection, StartWeights | None], Objective]


class PreferenceMethod(OneModel):
    """A training method (see ``training.method.Method``) whose objective compares or judges whole answers.

    Args:
        kind: how records are rendered, "pair" or "judged".
        title: heading on the terminal.
        make: makes the objective from the settings, the decoder's process groups, and the reference model if it is run
            in each step (otherwise None).
        has_reference: whether the objective compares the model with a reference model.
        scores: whether the model has a reward head.
    """

    def __init__(self, kind: Kind, title: str, make: MakeObjective, *, has_reference: bool, scores: bool = False):
        self.kind, self.title, self.scores = kind, title, scores
        self._make, self._has_reference = make, has_reference

    def bare_objective(self, session: Session) -> Objective:
        return self._make(session.settings, session.groups.language, None)

    def keeps_start(self, settings: Settings) -> bool:
        return self._has_reference and settings.align.reference_at == "step"

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        files, start = FileRows.of(session, self.kind), None
        rows: RowSource | None = files.loader
        attach = None
        if self.keeps_start(session.settings):
            start = StartWeights(session)
        elif self._has_reference:
            data = None
            if files.loader is not None and files.renderer is not None:
                data = AnswerData(files.loader.sources, files.renderer, files.loader.fatal)
            reference = reference_of(session, data, self.kind, heartbeat)
            rows = MappedRows(rows, reference.attach) if rows is not None else None
            if session.settings.eval.is_on:
                held_out = _held_out(session.settings, files)
                attach = reference_of(session, held_out, self.kind, heartbeat, held_out=True).attach
                if files.loader is not None and session.settings.data.workers == 0:
                    files.loader.fatal.notes.use(0)  # this process reads samples of training again
        objective = self._make(session.settings, session.groups.language, start)
        return Prepared(objective, rows, files.longest_row, files.loader, attach=attach)


def _held_out(settings: Settings, files: FileRows) -> AnswerData | None:
    """All samples of data.eval, on leaders."""
    if files.renderer is None:
        return None
    sources = open_eval_sources(settings.data)
    return AnswerData(sources, files.renderer, FatalSamples(sources, settings.data.workers))


def check_reference(settings: Settings, verb: str) -> None:
    """Raises UserError if the weights of the reference model, which ``verb`` needs, would be random."""
    if settings.model.load == RANDOM:
        raise UserError(
            f"model.load is random, but {verb} compares the model with the weights that it starts from",
            "set model.load to these weights",
        )


def check(settings: Settings, verb: str) -> None:
    """Raises UserError for settings that would be ignored, or that would cut off answers."""
    if settings.data.too_long == "truncate":
        raise UserError(
            f"data.too_long is truncate, but {verb} compares whole answers, which must not be truncated",
            "set data.too_long to drop",
        )
    align = settings.align
    if align.reference_at == "step" and align.reference is not None:
        raise UserError(
            f"align.reference is {align.reference}, but align.reference_at is step: the file would be ignored",
            "remove one of these settings",
        )
    if settings.train.kl_to_start:
        raise UserError(
            f"train.kl_to_start is {settings.train.kl_to_start:g}, but {verb} does not use it, so it would be ignored",
            "remove train.kl_to_start; align.beta controls how far the model may move from the reference model",
        )
    if settings.data.replay is not None:
        raise UserError(f"data.replay is set, but {verb} does not use it, so it would be ignored", "remove data.replay")
