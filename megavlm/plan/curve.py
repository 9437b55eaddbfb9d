"""The learning rates of a run as one line of text."""

from types import SimpleNamespace

import numpy as np

from megavlm.config.train_section import TrainSettings
from megavlm.optim.schedule import Schedule

_BARS = "▁▂▃▄▅▆▇█"


def curve(train: TrainSettings, width: int = 40, idle_steps: int = 0) -> str:
    """One line of text about the learning rates of a run: a small picture, and the rates at three steps.

    Args:
        train: the ``train`` section, with ``lr`` and a number of steps.
        width: number of characters of the picture.
        idle_steps: number of steps at the beginning without updates.
    """
    schedule = Schedule(SimpleNamespace(param_groups=[]), train, idle_steps=idle_steps)
    steps = train.steps or train.length

    def rate(step: int) -> float:
        schedule.num_steps = step - 1 - idle_steps  # the updates before the step
        return schedule.get_lr({}) if schedule.num_steps >= 0 else 0.0

    at = sorted({round(step) for step in np.linspace(1, steps, min(width, steps))})
    rates = [rate(step) for step in at]
    top = max(*rates, 1e-300)
    bars = "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in rates)
    peak = at[rates.index(max(rates))]
    told = [f"{rate(step):.3g} in step {step:,}" for step in dict.fromkeys((1, peak, steps))]
    return f"{bars} {', '.join(told)}"
