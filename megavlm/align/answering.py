"""How held-out questions are answered while a model is trained, whatever the method."""

from typing import NamedTuple

from megavlm.config.settings import Settings


class Answering(NamedTuple):
    """How held-out questions are answered: as the section ``section`` says, unless eval.answers says otherwise.

    An answer (with an environment, a turn) has at most ``max_new_tokens`` tokens, and what follows a question at most
    ``room``, which the setting ``setting`` gives. ``places`` answers are worked on at the same time.
    """

    section: str
    max_new_tokens: int
    room: int
    setting: str
    places: int

    @classmethod
    def of(cls, settings: Settings) -> "Answering":
        """As in the section ``generate`` or, for methods that sample answers, ``rollout``."""
        given, setting = settings.eval.answers.max_new_tokens, "eval.answers.max_new_tokens"
        section, tokens, places = "generate", settings.generate.max_new_tokens, settings.generate.batch_size
        if settings.rollout.prompts is not None:
            section, tokens, places = "rollout", settings.rollout.max_new_tokens, settings.rollout.max_sequences
        if given is None:
            given, setting = tokens, f"{section}.max_new_tokens"
        if section == "rollout" and (whole := settings.environment.max_tokens):
            return cls(section, given, whole, "environment.max_tokens", places)
        return cls(section, given, given, setting, places)
