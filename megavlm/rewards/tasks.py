"""What is left to do for a group of answers, and who is to blame if a reward fails for it."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megavlm.config.reward_section import RewardSettings
from megavlm.rewards.score import Score, score

MOST_DEATHS = 3  # workers that answers of a group, tried one by one, may end; starting another takes seconds


class Task:
    """One reward of one group. All its answers are judged in one call.

    If that call raises, takes too long or ends its process, the answers are judged one by one, so that only those fail
    that are to blame. Both together take at most twice the time-out, not counting the start of new workers. An answer
    that was alone with a worker that was killed is tried once more: the reason may have come from outside, such as
    another process that takes all memory. If that happens twice, the answer is to blame.

    Attributes:
        group: the group.
        reward: the number of the reward.
        values: the value of each answer so far.
        causes: for each answer that failed, why.
    """

    def __init__(self, group: "Group", reward: int, timeout: float):
        self.group, self.reward = group, reward
        self.values: list[float | None] = [None] * group.count
        self.causes: dict[int, str] = {}
        self._timeout, self._seconds, self._deaths = timeout, 0.0, 0
        self._single: deque[int] | None = None  # the answers that are left to be judged one by one
        self._was_killed = False  # whether the first of them has been alone with a worker that was killed

    @property
    def is_done(self) -> bool:
        """Whether every answer has a value or a cause."""
        return self._single is not None and not self._single

    @property
    def answers(self) -> list[int] | None:
        """The answers of the next call; None: all."""
        return None if self._single is None else [self._single[0]]

    @property
    def limit(self) -> float:
        """Seconds that the next call may take. What an answer leaves over is for those after it."""
        left = 2 * self._timeout - self._seconds
        return self._timeout if self._single is None else max(0.05, left / len(self._single))

    def succeeded(self, values: Sequence[float | None], causes: Mapping[str, str], seconds: float) -> None:
        """A call has returned these values after so many seconds, with the causes of bad ones by position."""
        answers = range(self.group.count) if self._single is None else [self._single.popleft()]
        self._single = self._single or deque()
        self._seconds += seconds
        self._was_killed = False
        for position, answer in enumerate(answers):
            self.values[answer] = values[position]
            if (cause := causes.get(str(position))) is not None:
                self.causes[answer] = cause

    def failed(self, cause: str, seconds: float, *, has_ended: bool, was_killed: bool = False) -> None:
        """A call has given no values.

        Args:
            cause: why, for example "no result after 10 s".
            seconds: how long it took.
            has_ended: whether it has cost the worker.
            was_killed: whether SIGKILL has ended the worker, and not because the call took too long.
        """
        self._seconds += seconds
        if self._single is None:
            self._single = deque(range(self.group.count))
            if self.group.count > 1:
                return
        self._was_killed = was_killed and not self._was_killed
        if self._was_killed:
            return
        self.causes[self._single.popleft()] = cause
        self._deaths += has_ended
        if self._deaths == MOST_DEATHS:
            while self._single:
                self.causes[self._single.popleft()] = f"not tried after {MOST_DEATHS} other answers: {cause}"

    def give_up(self, cause: str) -> None:
        """All answers fail for this cause."""
        self._single = deque()
        self.causes = dict.fromkeys(range(self.group.count), cause)


@dataclass
class Group:
    """The answers to one prompt, and the tasks of all rewards.

    Attributes:
        key: what the caller names it.
        count: number of answers.
        payload: pickled (completions, columns).
        tasks: one for each reward.
    """

    key: Hashable
    count: int
    payload: bytes
    tasks: list[Task] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all rewards are known or have failed."""
        return all(task.is_done for task in self.tasks)

    def scores(self, rewards: Sequence[RewardSettings]) -> list[Score]:
        """The score of each answer, when all is done."""
        weights: dict[str, Any] = {reward.key: reward.weight for reward in rewards}
        names = [rewards[task.reward].key for task in self.tasks]
        found = []
        for answer in range(self.count):
            parts = {name: task.values[answer] for name, task in zip(names, self.tasks, strict=True)}
            causes = zip(names, (task.causes.get(answer) for task in self.tasks), strict=True)
            found.append(score(parts, [f"{name}: {cause}" for name, cause in causes if cause], weights))
        return found
