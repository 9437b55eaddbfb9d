"""How held-out questions are answered while a model is trained: the settings that decide, whatever the method."""

from dataclasses import dataclass

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings


@dataclass(frozen=True)
class Answering:
    """How held-out questions are answered.

    Attributes:
        max_new_tokens: maximum number of tokens of an answer or, with an environment, of a turn.
        room: maximum number of tokens after a question: of an answer or, with an environment, of all turns.
        setting: the setting that gives ``room``.
        stop: texts that end an answer.
        places: number of answers at the same time.
        cache_gib, cache_setting: memory for keys and values, and the setting that gives it.
        batch_invariant: as ``generate.batch_invariant``.
    """

    max_new_tokens: int
    room: int
    setting: str
    stop: tuple[str, ...]
    places: int
    cache_gib: float
    cache_setting: str
    batch_invariant: bool

    @classmethod
    def of(cls, settings: Settings) -> "Answering":
        """As in the section ``generate`` or, for methods that sample answers, ``rollout``."""
        samples = settings.rollout.prompts is not None
        section, how = ("rollout", settings.rollout) if samples else ("generate", settings.generate)
        given = settings.eval.answers.max_new_tokens
        tokens = how.max_new_tokens if given is None else given
        setting = f"{section}.max_new_tokens" if given is None else "eval.answers.max_new_tokens"
        if samples and settings.environment.max_tokens:
            room, setting = settings.environment.max_tokens, "environment.max_tokens"
        else:
            room = tokens
        return cls(
            max_new_tokens=tokens,
            room=room,
            setting=setting,
            stop=tuple(how.stop),
            places=settings.rollout.max_sequences if samples else settings.generate.batch_size,
            cache_gib=how.cache_gib,
            cache_setting=f"{section}.cache_gib",
            batch_invariant=how.batch_invariant,
        )


def check_answering(settings: Settings, name: str, *, samples: bool) -> None:
    """Raises UserError for settings of ``eval.answers`` that do not fit.

    Args:
        settings: the settings of a run that evaluates.
        name: the verb.
        samples: whether it samples answers itself.
    """
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
