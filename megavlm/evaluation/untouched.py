"""What every evaluation has in common: it changes nothing of the training, and it says what it has found."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from megavlm.base.number_format import number, percent
from megavlm.checkpoint.manager import random_state, set_random_state
from megavlm.training.hooks import Fields
from megavlm.training.run import Run


@contextmanager
def training_untouched(run: Run) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards, all is as if nothing had been computed.

    Weights, gradients, random states, and the place in the training data stay.
    """
    vlm, state = run.session.vlm, random_state()
    vlm.train(False)
    try:
        yield
    finally:
        vlm.train(True)
        set_random_state(state)
        if run.session.settings.data.workers == 0 and run.loader is not None:
            run.loader.fatal.notes.use(0)  # this process reads samples of training again


def raise_first(problems: Iterable[Exception | None]) -> None:
    """Raises the first problem, if there is any. All ranks call it with the problems of all ranks."""
    if (problem := next((problem for problem in problems if problem is not None), None)) is not None:
        raise problem


def told(step: int, fields: Fields, seconds: float) -> str:
    """The result of an evaluation on one line."""
    listed = " · ".join(f"{name} {_shown(name, value)}" for name, value in fields.items())
    return f"step {step}: held out · {listed} · {seconds:.1f} s"


def _shown(name: str, value: float | None) -> str:
    return percent(value) if name.endswith(("/accuracy", "_share")) else number(value)
