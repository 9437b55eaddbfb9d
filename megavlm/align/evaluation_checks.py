"""Settings of evaluation while training that do not fit a method; checked before anything large is imported."""

from typing import TYPE_CHECKING

from megavlm.align.answering import Answering
from megavlm.base.errors import UserError
from megavlm.config.eval_section import SCORE
from megavlm.config.settings import Settings

if TYPE_CHECKING:
    from megavlm.records.records import Kind


def check_evaluation(settings: Settings, name: str, kind: "Kind", *, samples: bool) -> None:
    """Raises UserError for settings of the section eval that a method cannot follow.

    Args:
        settings: the settings of a run.
        name: the verb.
        kind: what it trains on.
        samples: whether it samples answers itself.
    """
    chosen = settings.eval
    if not chosen.is_on:
        return
    if samples and chosen.rows is not None:
        raise UserError(
            f"eval.rows is {chosen.rows}, but {name} computes no held-out loss: it would be ignored",
            "remove eval.rows; eval.answers.samples limits the number of held-out questions",
        )
    _check_answers(settings, name, samples=samples)
    answers = samples or chosen.answers.samples is not None
    measures = {
        "loss": not samples,
        "accuracy": kind in ("pair", "judged"),
        "margin": kind in ("pair", "judged"),
        SCORE: answers,
    }
    if chosen.measure is not None and not measures[chosen.measure]:
        known = " or ".join(f"eval/{measure}" for measure, is_known in measures.items() if is_known)
        why = f"{name} does not measure it"
        if chosen.measure == SCORE:
            why = "eval.answers.samples is null, so that no answers are judged"
        raise UserError(f"eval.best is {chosen.best}, but {why}", f"set eval.best to {known}")


def _check_answers(settings: Settings, name: str, *, samples: bool) -> None:
    """Raises UserError for settings of ``eval.answers`` that do not fit."""
    chosen, how = settings.eval.answers, Answering.of(settings)
    if not samples:
        if chosen.samples is None and settings.eval.is_changed("answers"):
            raise UserError(
                "eval.answers is set, but eval.answers.samples is null: it would be ignored",
                "set eval.answers.samples to the number of questions, or remove eval.answers",
            )
        if chosen.samples is None:
            return
        if name == "rm":
            raise UserError(
                "eval.answers.samples is set, but a reward model gives scores and no answers", "remove eval.answers"
            )
        if not chosen.scorer:
            raise UserError(
                f"eval.answers.samples is {chosen.samples}, but eval.answers.scorer is empty: how are the answers "
                "judged?",
                "set eval.answers.scorer, for example to exact",
            )
    if how.room >= settings.data.seq_length:
        raise UserError(
            f"{how.setting} is {how.room}, but a row has data.seq_length = {settings.data.seq_length} tokens for a "
            "held-out question and its answer",
            f"raise data.seq_length, or lower {how.setting}",
        )
    if settings.train.precision == "fp8":
        raise UserError(
            "eval.answers.samples is set, but train.precision is fp8, in which sampling has not been tried",
            "set train.precision to bf16, or remove eval.answers",
        )
    if settings.train.overlap.tensor:
        raise UserError(
            "eval.answers.samples is set, but train.overlap.tensor is true, whose buffers have the size of a training "
            "row, and sampled rows have others",
            "set train.overlap.tensor to false, or remove eval.answers",
        )
