"""Has held-out questions answered in the weights that are trained, and judges the answers with reward functions."""

from collections.abc import Sequence
from typing import Any, Self

from megavlm.align.answering import Answering
from megavlm.base.errors import RunFailure, UserError
from megavlm.base.heartbeat import beat
from megavlm.config.reward_section import RewardSettings
from megavlm.evaluation.untouched import raise_first
from megavlm.platform.collectives import all_gather_objects
from megavlm.rewards.pool import RewardPool
from megavlm.rewards.score import Score, columns_of
from megavlm.rollout.answerer import stop_tokens, text_of, vision_tokens
from megavlm.rollout.builtin import BuiltinEngine
from megavlm.rollout.engine import Answer, Answered, Engine, Sampling
from megavlm.runtime.session import Session

_SECONDS_BETWEEN_SIGNS = 1.0  # of life, while scores are awaited


class Judge:
    """Answers and judges in one evaluation; a context manager, after which no process and no memory is left.

    Create it on all ranks. The weights are those of the session's main model, in its layout; nothing is copied.

    Args:
        session: the session of the run.
        tokenizer: decodes the answers.

    Attributes:
        sampling: the most likely token is always taken.
        weights: the weight of each score in the sum, by name.
        engine: answers the questions.
    """

    def __init__(self, session: Session, tokenizer: Any):
        settings = session.settings
        self._session, self._tokenizer, self._how = session, tokenizer, Answering.of(settings)
        self._section = settings.rollout if self._how.section == "rollout" else settings.generate
        self.sampling = Sampling(
            self._how.max_new_tokens,
            stop=stop_tokens(settings.model.hf, tokenizer),
            stop_strings=tuple(self._section.stop),
            banned=vision_tokens(session.shapes),
        )
        self.weights = {reward.key: reward.weight for reward in self.rewards}
        self._found: dict[int, list[Score]] = {}
        self._pool: RewardPool | None = None

    @property
    def rewards(self) -> Sequence[RewardSettings]:
        """How the answers are judged."""
        return self._session.settings.eval.answers.scorer

    def __enter__(self) -> Self:
        self.engine = self._make_engine()
        if self._session.groups.is_leader:
            self._pool = RewardPool(self.rewards, self._session.settings.reward_pool.workers)
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()
        if self._pool is not None:
            self._pool.close()

    def submit(self, number: int, answered: Answered) -> None:
        """Begins to judge the answers to a prompt, on leaders, while others are answered.

        Args:
            number: names the prompt; the numbers of a rank are 0, 1, ….
            answered: the prompt and its answers.
        """
        assert self._pool is not None, "answers arrive on leaders"
        asked, texts = answered.asked, [self.text(answer) for answer in answered.answers]
        self._pool.submit(number, texts, columns_of(asked.fields, asked.question, len(texts)))

    def scores(self, answered: Sequence[Answered]) -> list[list[Score]]:
        """The scores of all answers that were submitted, in order, on leaders; elsewhere []. Call it on all ranks.

        Raises:
            UserError, RunFailure: on all ranks, if the scorers cannot be run.
        """
        problem: Exception | None = None
        try:
            while self._pool is not None and len(self._found) < len(answered):  # not for ever: they have time-outs
                found = self._pool.results(_SECONDS_BETWEEN_SIGNS)
                self._found |= {number: scores for number, scores in found if isinstance(number, int)}
                beat("the scores of held-out answers")
        except (UserError, RunFailure) as error:
            problem = error
        raise_first(all_gather_objects(problem, self._session.groups.world_host))
        return [self._found[number] for number in range(len(answered))]

    def text(self, answer: Answer) -> str:
        """What is judged of an answer: its text up to the first stop string in it."""
        return text_of(self._tokenizer, answer.tokens, self.sampling.stop_strings)

    def whole_text(self, answer: Answer) -> str:
        """An answer for a reader, with its special tokens."""
        return self._tokenizer.decode(answer.last, skip_special_tokens=False)

    def _make_engine(self) -> Engine:
        """The built-in engine, whichever engine the run has: it needs no copy of the weights."""
        session, how = self._session, self._how
        return BuiltinEngine(
            session.vlm,
            places=how.places,
            cache_gib=self._section.cache_gib,
            cache_setting=f"{how.section}.cache_gib",
            prompt_tokens=session.settings.data.seq_length,
            chunk_tokens=session.settings.train.logprob_chunk_tokens,
            batch_invariant=self._section.batch_invariant,
            decode=self._tokenizer.decode,
            special=self._tokenizer.all_special_ids,
        )
