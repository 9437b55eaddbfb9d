"""Hooks: work in addition to the training steps, such as evaluation, a profiler, or the report at the end."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megavlm.base.errors import RunFailure, UserError
from megavlm.training.run import Run

Fields = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Hook:
    """A function that the training loop calls on all ranks, or with ``at_answers`` on one, where it waits for no other.

    After a step, it raises a UserError or RunFailure on all ranks or on none: the step is saved before the run ends.

    Attributes:
        call: the function. Its arguments are the run, the number of the last step and a function that prints a message
            on the terminal. The fields that it returns after a step are added to that step's line of metrics.jsonl.
        every: it is called after each step whose number is divisible by this; None: steps do not count.
        every_epochs: it is called after each step that ends so many passes over the training data; None: they do not
            count.
        at_last: whether it is also called after the last step of the run, and its fields are in the line of that step.
        at_checkpoint: whether it is called after a step whose checkpoint is complete or being written.
        at_answers: whether it is called after a step whose sampled answers were recorded, on rank 0 alone.
        at_start: whether it is also called before the first step of a new run, as after step 0, which then has a line
            of metrics.jsonl.
        at_end: whether it is called once after the last step, when all checkpoints are complete. It is not called if
            the run fails.
        prepare: is called before the first step of each start, so that what the hook cannot do is found early.
    """

    call: Callable[[Run, int, Callable[[str], None]], Fields | None]
    every: int | None = None
    every_epochs: int | None = None
    at_last: bool = False
    at_checkpoint: bool = False
    at_answers: bool = False
    at_start: bool = False
    at_end: bool = False
    prepare: Callable[[Run], None] | None = None

    def is_due(self, step: int, ends_epoch: Callable[[int], bool], *, is_last: bool) -> bool:
        """Whether the hook is called after this step; ``ends_epoch`` is that of ``RunMonitor``."""
        of_steps = self.every is not None and step % self.every == 0
        of_epochs = self.every_epochs is not None and ends_epoch(self.every_epochs)
        return (is_last and self.at_last) or of_steps or of_epochs


def call_all(
    hooks: Iterable[Hook], run: Run, step: int, say: Callable[[str], None]
) -> tuple[dict[str, float | int | None], UserError | RunFailure | None]:
    """Calls hooks after a step. Returns their fields, and the error with which one of them, the last called, ended."""
    fields: dict[str, float | int | None] = {}
    try:
        for hook in hooks:
            fields |= hook.call(run, step, say) or {}
    except (UserError, RunFailure) as error:
        return fields, error
    return fields, None
