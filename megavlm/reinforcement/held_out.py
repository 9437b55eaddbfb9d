"""Judges answers to held-out questions with the rewards that a run learns from."""

from collections.abc import Sequence
from typing import Any

from megavlm.config.environment_section import ENVIRONMENT
from megavlm.config.reward_section import RewardSettings
from megavlm.data.renderer import Renderer
from megavlm.evaluation.judge import Judge
from megavlm.reinforcement.answer_rows import AnswerGroup
from megavlm.reinforcement.engines import in_turns
from megavlm.reinforcement.judged import with_environment, with_models
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.rewards.score import Score
from megavlm.rollout.engine import Answer, Answered, Engine
from megavlm.runtime.session import Session


class OwnRewards(Judge):
    """The rewards of the run, models and environment among them, unless ``eval.answers.scorer`` names others.

    What only learning needs is no part of a score: the divergence of ``align.kl_in``, and ``align.overlong_cache``.

    Args:
        session: the session of the run.
        renderer: packs answers for the reward models, and renders the environment's messages; on leaders.
        models: the reward models among the rewards.
        tokenizer: decodes the answers.
    """

    def __init__(self, session: Session, renderer: Renderer | None, models: RewardModels, tokenizer: Any):
        self._renderer, self._models = renderer, models
        self._is_own = not session.settings.eval.answers.scorer
        self._speaks = session.settings.environment.python is not None
        super().__init__(session, tokenizer)
        if self._speaks and self._is_own:
            self.weights[ENVIRONMENT] = session.settings.environment.weight

    @property
    def rewards(self) -> Sequence[RewardSettings]:
        return self._session.settings.reward if self._is_own else super().rewards

    def scores(self, answered: Sequence[Answered]) -> list[list[Score]]:
        found = super().scores(answered)
        if not self._is_own:
            return found
        groups = [AnswerGroup(one.prompt.sample, one.answers, [0.0] * len(one.answers)) for one in answered]
        of_models = self._models.scores(groups)
        first = 0
        for one, scores in zip(answered, found, strict=True):
            for number, answer in enumerate(one.answers):
                values = {name: values[first + number] for name, values in of_models.items()}
                scores[number] = with_models(scores[number], values, self.weights)
                if self._speaks:
                    scores[number] = with_environment(scores[number], answer, self.weights)
            first += len(one.answers)
        return found

    def text(self, answer: Answer) -> str:
        """What rewards judge while the model learns: of several turns the last one, with a stop string at its end."""
        return self._tokenizer.decode(answer.last, skip_special_tokens=True)

    def _make_engine(self) -> Engine:
        return in_turns(self._session, super()._make_engine(), self._renderer)
