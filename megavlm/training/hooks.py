"""Work beside the steps of a run: evaluation, a profiler, the report, or whatever a caller of ``train`` wants done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megavlm.training.run import Run

Fields = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Hook:
    """A function that the training loop calls on all ranks.

    Attributes:
        call: gets the run, the number of the last step and a function that shows a message on the terminal. What it
            returns after a step is added to that step's line of metrics.jsonl.
        every: call it after each step whose number is divisible by this; None: after none.
        at_end: call it once after the last step, when every checkpoint is complete. A run that fails has no end.
    """

    call: Callable[[Run, int, Callable[[str], None]], Fields | None]
    every: int | None = None
    at_end: bool = False

    def is_due(self, step: int) -> bool:
        """Whether it is called after this step."""
        return self.every is not None and step % self.every == 0
