"""Answers that were sampled while training, for the report: a group side by side, with its pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from markupsafe import Markup, escape

from megavlm.base.errors import UserError
from megavlm.monitor.rollout_log import FILE_NAME, LoggedAnswer, LoggedGroup, read_rollouts
from megavlm.report.answers import thumbnail
from megavlm.report.run import RecordedRun, existing
from megavlm.sources.previews import looks_like_video, media_of, preview

MAX_NEWEST = 4  # number of newest steps on the page, beside the first one
_TOKEN = re.compile(r"&lt;\|[\w ]{1,40}\|&gt;")  # a special token, after escaping


@dataclass
class ShownGroup:
    """A group on the page.

    Attributes:
        logged: the group.
        answers: its answers, the highest reward first.
        pictures: data URLs of its pictures.
        notes: what is not shown.
    """

    logged: LoggedGroup
    answers: list[LoggedAnswer]
    pictures: list[str]
    notes: list[str]

    @property
    def rewards(self) -> list[float]:
        """The rewards of the answers that have one."""
        return [answer.reward for answer in self.answers if answer.reward is not None]

    @property
    def summary(self) -> str:
        """The rewards of the group in words."""
        if not (rewards := self.rewards):
            return "no answer has a reward"
        if len(self.answers) == 1:
            return ""  # the reward stands beside the answer
        if all(answer.advantage is None for answer in self.answers):  # of ppo, which does not compare answers
            return f"mean reward {fmean(rewards):.3g}"
        if len(set(rewards)) == 1:
            return f"all rewards {rewards[0]:.3g}: the group teaches nothing"
        return f"mean reward {fmean(rewards):.3g}, spread {pstdev(rewards):.3g}"


@dataclass
class ShownStep:
    """The groups of a step on the page."""

    step: int
    groups: list[ShownGroup]

    @property
    def has_single_answers(self) -> bool:
        """Whether each question has one answer, so that questions stand side by side instead of their answers."""
        return all(len(group.answers) == 1 for group in self.groups)

    @property
    def mean_reward(self) -> float | None:
        """The mean reward of the answers that are shown."""
        rewards = [reward for group in self.groups for reward in group.rewards]
        return fmean(rewards) if rewards else None


def shown_rollouts(run: RecordedRun, name: str = FILE_NAME) -> list[ShownStep]:
    """The steps in a file that are shown, newest first: the newest MAX_NEWEST ones and the first one.

    ``name`` is that of rollouts.jsonl or of a file of the same form.
    """
    steps = read_rollouts(run.folder, name)
    chosen = [*steps[:1], *steps[1:][-MAX_NEWEST:]]
    return [ShownStep(step.step, [_shown(group, run) for group in step.groups]) for step in reversed(chosen)]


def marked_tokens(text: str) -> Markup:
    """A text, escaped, whose special tokens are marked."""
    return Markup(_TOKEN.sub(lambda found: f'<i class="token">{found[0]}</i>', str(escape(text))))


def _shown(group: LoggedGroup, run: RecordedRun) -> ShownGroup:
    notes, pictures = [], []
    for named in group.media:
        try:
            pictures.append(_thumbnail(named, group.sample, run))
        except UserError as error:
            notes.append(str(error))
    for count, what in ((group.media_left_out, "pictures and videos"), (group.answers_left_out, "answers")):
        if count:
            notes.append(f"not shown: {count} more {what}")
    return ShownGroup(group, _best_first(group.answers), pictures, notes)


def _thumbnail(named: Any, sample: str, run: RecordedRun) -> str:
    file, _, number = sample.rpartition(":")
    found = existing(Path(file), run.folder)  # relative to the folder in which the run was started
    find = media_of(f"{found or file}:{number}", run.access)
    return thumbnail(preview(named, looks_like_video(named), find, sample))


def _best_first(answers: Sequence[LoggedAnswer]) -> list[LoggedAnswer]:
    return sorted(answers, key=lambda answer: float("inf") if answer.reward is None else -answer.reward)
