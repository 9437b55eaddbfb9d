"""The best value of a metric of held-out data, and whether the run ends early for want of a better one.

Everything follows from the lines of metrics.jsonl, so a run that is continued knows it without a file of its own.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megavlm.base.number_format import counted, number
from megavlm.config.eval_section import EvalSettings


class Best:
    """Follows ``eval.best`` through the lines of a run, the same on all ranks.

    Args:
        settings: the section eval.
        past: the lines of earlier starts of the run, oldest first.

    Attributes:
        step: the step that has the best value so far; None before the first.
        value: that value.
        since: number of evaluations after it.
    """

    def __init__(self, settings: EvalSettings, past: Iterable[Mapping[str, Any]] = ()):
        self._settings, self.metric = settings, settings.best
        self.step: int | None = None
        self.value, self.since = math.nan, 0
        for line in past:
            self.take(line)

    def take(self, line: Mapping[str, Any]) -> None:
        """Takes the line of the next step. One without the metric, which was not evaluated, changes nothing.

        Neither does that of step 0: the weights at the start have no checkpoint that could be the best.
        """
        if self.metric is None or self.metric not in line or not line["step"]:
            return
        value = line[self.metric]
        known = value is not None and math.isfinite(value)
        sign = 1 if self._settings.higher_is_better else -1
        if known and (self.step is None or sign * value > sign * self.value):
            self.step, self.value, self.since = line["step"], value, 0
        else:
            self.since += 1

    def forget(self) -> None:
        """The checkpoint of the best step is lost: the next evaluation counts as the best."""
        self.step, self.value = None, math.nan

    def told(self) -> str:
        """The best value and its step in words."""
        return f"{self.metric} {number(self.value)}"

    def ending(self, step: int) -> str | None:
        """Why the run ends after ``step``; None if it goes on."""
        after = self._settings.stop_after
        if after is None or self.since < after:
            return None
        best = "" if self.step is None else f"; the best, {number(self.value)}, is that of step {self.step}"
        return (
            f"stopped early at step {step}: {self.metric} has not improved in {counted(self.since, 'evaluation')}{best}"
        )
