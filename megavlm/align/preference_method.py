"""A preference method on the training loop: its samples, its objective, its reference."""

from collections.abc import Callable, Iterator

from megavlm.align.reference import Reference, reference_of
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.sources import Source
from megavlm.runtime.session import Session
from megavlm.training.objective import Objective
from megavlm.training.start_weights import StartWeights


class PreferenceMethod:
    """What the loop asks of a method that learns from answers (see ``training.loop.Method``).

    Args:
        kind: how records are rendered, "pair" or "judged".
        title: heading on the terminal.
        make: the objective, given settings and the decoder's process groups.
        scores: whether the model has a reward head.
    """

    def __init__(self, kind: Kind, title: str, make, *, scores: bool = False):
        self.kind, self.title, self.scores, self._make = kind, title, scores, make
        self._reference: Reference | None = None

    def bare_objective(self, session: Session) -> Objective:
        return self._make(session.settings, session.groups.language)

    def objective(
        self,
        session: Session,
        renderer: Renderer | None,
        sources: list[Source] | None,
        heartbeat: Callable[[str], None],
    ) -> Objective:
        """Called on all ranks, before the optimizer is built; the weights may be others afterwards."""
        objective = self.bare_objective(session)
        if objective.has_reference and session.settings.align.reference_at == "step":
            objective.start = StartWeights(session)
        elif objective.has_reference:
            self._reference = reference_of(session, renderer, sources, self.kind, heartbeat)
        return objective

    def rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        return self._reference.attach(rows) if self._reference else rows


def check(settings: Settings, verb: str) -> None:
    """Raises UserError for settings that would be ignored, or would cut a prompt away from one of its answers."""
    if settings.data.too_long == "truncate":
        raise UserError(
            f"data.too_long is truncate, but {verb} compares answers to the same prompt: they are never cut",
            "set data.too_long to drop",
        )
    align = settings.align
    if align.reference_at == "step" and align.reference is not None:
        raise UserError(
            f"align.reference is {align.reference}, but align.reference_at is step: it would be ignored",
            "remove one of them",
        )
    if settings.train.kl_to_start:
        raise UserError(
            f"train.kl_to_start is {settings.train.kl_to_start:g}, but {verb} has none: it would be ignored",
            "remove it; align.beta says how far the policy may go from the reference",
        )
    if settings.data.replay is not None:
        raise UserError(f"data.replay is set, but {verb} has no replay: it would be ignored", "remove data.replay")
    if settings.stage is not None:
        raise UserError(f"stage is {settings.stage}, but {verb} has no stages: it would be ignored", "set it to null")
