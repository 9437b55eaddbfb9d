"""The learning rates of a run as one line of text."""

from types import SimpleNamespace

import numpy as np

from megavlm.config.train_section import TrainSettings
from megavlm.optim.schedule import Schedule

_BARS = "▁▂▃▄▅▆▇█"


def curve(train: TrainSettings, width: int = 40) -> str:
    """One line of text about the learning rates of a run: a small picture, and the rates at three steps.

    Args:
        train: the ``train`` section, with ``lr`` and a number of steps.
        width: number of characters of the picture.
    """
    schedule = Schedule(SimpleNamespace(param_groups=[]), train)
    steps = train.steps or train.length

    def rate(step: int) -> float:
        schedule.num_steps = step - 1  # the updates before the step
        return schedule.get_lr({})

    at = sorted({round(step) for step in np.linspace(1, steps, min(width, steps))})
    rates = [rate(step) for step in at]
    top = max(*rates, 1e-300)
    bars = "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in rates)
    peak = at[rates.index(max(rates))]
    told = [f"{rate(step):.3g} in step {step:,}" for step in dict.fromkeys((1, peak, steps))]
    return f"{bars} {', '.join(told)}"
