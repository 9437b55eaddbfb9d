"""reward_failures.jsonl lists the answers whose reward failed; a run in which too many fail ends.

A line has ``step``, ``sample`` ("file:line" or "shard:number"), ``answer`` (its number in the group, from 0),
``reward`` (the name of the reward) and ``cause``.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.base.number_format import percent
from megavlm.monitor.metrics import append_lines, drop_after

FILE_NAME = "reward_failures.jsonl"
LAST = 1000  # answers whose failures are compared with the limit
CHECKED_FROM = 100  # answers before the limit counts; of fewer, one bad prompt could be too large a share
_LISTED = 100  # lines for one step: if all fail, the file must not grow without end
_TOLD = 3  # causes that are shown


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer as far as its rewards' success goes.

    Attributes:
        sample: "file:line" or "shard:number" of its prompt.
        answer: its number in the group, from 0.
        parts: by the name of each reward, its value; None if it failed or does not apply.
        failures: "NAME: cause" for each reward that failed.
        is_counted: whether it has a total in spite of them, because the failed rewards have weight 0.
    """

    sample: str
    answer: int
    parts: Mapping[str, float | None]
    failures: Sequence[str]
    is_counted: bool = False


@dataclass
class _Step:
    answers: int
    failed: int
    causes: Counter[str] = field(default_factory=Counter)


class RewardFailures:
    """Records the failed rewards of each step. Create it on rank 0 alone, and give it the answers of all ranks.

    Args:
        output: the run's folder.
        resume_step: the step from which the run continues; lines of later steps are removed. The share is counted
            anew.
        limit: the fraction of answers that may fail (``reward_pool.max_failed_fraction``).
        say: shows a message.
    """

    def __init__(self, output: Path, resume_step: int, limit: float, say: Callable[[str], None]):
        self.path, self._limit, self._say = output / FILE_NAME, limit, say
        self._steps: deque[_Step] = deque()
        self._has_told: set[str] = set()  # what was said, so that it is said once
        drop_after(self.path, resume_step)

    def take(self, step: int, answers: Iterable[JudgedAnswer]) -> None:
        """Records the answers of a step. Raises UserError if the disk is full."""
        answers = list(answers)
        failed = [answer for answer in answers if answer.failures]
        lines = []
        here = _Step(len(answers), sum(not answer.is_counted for answer in failed))
        for answer in failed:
            for failure in answer.failures:
                reward, _, cause = failure.partition(": ")
                here.causes[failure] += 1
                line = {
                    "step": step,
                    "sample": answer.sample,
                    "answer": answer.answer,
                    "reward": reward,
                    "cause": cause,
                }
                lines.append(json.dumps(line) + "\n")
                self._tell(f"failed {reward}", f"{answer.sample}: the reward {failure}; {FILE_NAME} lists such answers")
        if lines:
            append_lines(self.path, lines[:_LISTED])
        self._tell_where_none_applies(answers)
        self._steps.append(here)
        while sum(s.answers for s in self._steps) - self._steps[0].answers >= LAST:
            self._steps.popleft()

    def failure(self) -> UserError | None:
        """The error with which the run is to end if too many answers failed; None if it can go on."""
        answers, failed = (sum(getattr(step, name) for step in self._steps) for name in ("answers", "failed"))
        if answers < CHECKED_FROM or failed <= self._limit * answers:
            return None
        causes = sum((step.causes for step in self._steps), Counter[str]())
        listed = "".join(f"\n  {count:,} × {cause}" for cause, count in causes.most_common(_TOLD))
        return UserError(
            f"of the last {answers:,} answers, {failed:,} ({percent(failed / answers)}) got no reward because a reward "
            f"failed: more than reward_pool.max_failed_fraction = {self._limit:g}{listed}",
            f"{self.path} names their samples. Repair the reward, or raise its timeout (--change reward); then the "
            "same command continues the run",
        )

    def _tell_where_none_applies(self, answers: Sequence[JudgedAnswer]) -> None:
        missing: Counter[str] = Counter()
        for answer in answers:
            failed = {failure.partition(": ")[0] for failure in answer.failures}
            missing.update(name for name, value in answer.parts.items() if value is None and name not in failed)
        for name, count in missing.items():
            share = percent(count / len(answers))
            self._tell(
                f"none {name}",
                f"the reward {name} does not apply to {share} of the answers of this step: their records lack what it "
                "compares with, or it returned None",
            )

    def _tell(self, what: str, text: str) -> None:
        if what not in self._has_told:
            self._has_told.add(what)
            self._say(text)
