"""Prompts with their sampled answers and what these are worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megavlm.config.environment_section import ENVIRONMENT
from megavlm.monitor.reward_failures import JudgedAnswer
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, LoggedTurn
from megavlm.records.skipped_samples import SkippedSample
from megavlm.reinforcement.answer_rows import AnswerGroup
from megavlm.rewards.score import Score, score
from megavlm.rollout.engine import Answer, Answered


@dataclass(frozen=True)
class Judged:
    """A prompt with its answers and, for each, its text with special tokens, score, reward (or None), advantage.

    If advantages are those of tokens (``of_tokens``), ``advantages`` are the rewards (0 for None).
    """

    answered: Answered
    full_texts: list[str]
    scores: list[Score]
    rewards: list[float | None]
    advantages: list[float]
    of_tokens: bool = False

    @property
    def is_flat(self) -> bool:
        """Whether all rewards of the group are equal or unknown, so that comparing them teaches nothing."""
        return len({reward for reward in self.rewards if reward is not None}) < 2

    @property
    def group(self) -> AnswerGroup:
        """What is learned from. An answer without a reward is left out."""
        known = [n for n, reward in enumerate(self.rewards) if reward is not None]
        answered, answers = self.answered, self.answered.answers
        chosen = [answers[n] for n in known]
        return AnswerGroup(answered.prompt.sample, chosen, [self.advantages[n] for n in known], answered.routing)


@dataclass
class Batch:
    """The answers of a step on this data-parallel rank.

    Attributes:
        groups: the groups to learn from, on the leader; [] elsewhere.
        shown: all groups that were sampled, whatever became of them, on the leader.
        fields: fields for metrics.jsonl, over all ranks.
        counts: samples (the answers to learn from), used/NAME, newly_read/NAME of each source and skipped_samples, over
            all ranks.
        skipped_samples: the prompts of this data-parallel rank that were skipped.
    """

    groups: list[Judged] = field(default_factory=list)
    shown: list[Judged] = field(default_factory=list)
    fields: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    skipped_samples: list[SkippedSample] = field(default_factory=list)


def with_models(found: Score, of_models: dict[str, float], weights: dict[str, float]) -> Score:
    """A score with those of reward models. One that is NaN or infinite has failed."""
    parts = {name: value if math.isfinite(value) else None for name, value in of_models.items()}
    failures = [f"{name}: it returned {of_models[name]}" for name, value in parts.items() if value is None]
    return score({**found.parts, **parts}, [*found.failures, *failures], weights)


def with_environment(found: Score, answer: Answer, weights: dict[str, float]) -> Score:
    """A score with the reward of an environment. An answer whose environment failed has no reward at all."""
    parts = {**found.parts, ENVIRONMENT: answer.reward}
    failures = [*found.failures, *(f"{ENVIRONMENT}: {cause}" for cause in answer.failures)]
    known = score(parts, failures, weights)
    return replace(known, total=None) if answer.failures else known


def failures_of(groups: Sequence[Judged]) -> list[JudgedAnswer]:
    """What is recorded of rewards that failed or did not apply."""
    return [
        JudgedAnswer(group.answered.prompt.sample.source, n, score.parts, score.failures, score.total is not None)
        for group in groups
        for n, score in enumerate(group.scores)
    ]


def logged(group: Judged) -> LoggedGroup:
    """What a reader sees of a group."""
    asked, answers = group.answered.asked, []
    for answer, text, one, reward, advantage in zip(
        group.answered.answers, group.full_texts, group.scores, group.rewards, group.advantages, strict=True
    ):
        shown = None if reward is None or group.of_tokens else advantage
        turns = [LoggedTurn(turn.by, turn.text, turn.pictures) for turn in answer.turns]
        answers.append(
            LoggedAnswer(text, reward, one.parts, shown, answer.num_said, answer.finish, one.failures, turns)
        )
    return LoggedGroup(group.answered.prompt.sample.source, asked.question, asked.media, asked.reference, answers)
