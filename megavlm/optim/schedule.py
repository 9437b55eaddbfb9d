"""The learning rate of each step: Megatron's schedules, restarts, a table, and a factor for smaller batches."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.config.requirements import required
from megavlm.config.train_section import TrainSettings

_ROWS = "train.global_batch_size"
_STYLES = {"wsd": "WSD", "inverse_sqrt": "inverse-square-root"}  # as Megatron writes them


class Schedule(OptimizerParamScheduler):
    """Sets the learning rate and the weight decay of each parameter group. It counts updates of the weights.

    Args:
        optimizer: has ``param_groups``.
        train: the ``train`` section.
        updates_per_step: number of updates of the weights in a step of the run.
        idle_steps: number of steps of the run without updates; the schedule is so much shorter.
    """

    def __init__(self, optimizer: Any, train: TrainSettings, updates_per_step: int = 1, idle_steps: int = 0):
        self.num_steps: int = 0
        self._train, self._updates_per_step, self._idle_steps = train, updates_per_step, idle_steps
        self._power = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}[train.batch_ramp_lr]
        self._restarts, self._table = train.restarts, sorted(train.schedule_table.items())
        length = max(train.length - idle_steps, 1) * updates_per_step
        endless = train.schedule in ("inverse_sqrt", "table")
        warmup = train.warmup * updates_per_step
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=required(train.lr, "train.lr"),
            min_lr=train.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=2**62 if endless else max(length, warmup + updates_per_step),
            lr_decay_style=_STYLES.get(train.schedule, train.schedule),
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=length,
            wd_incr_style="constant",
            wsd_decay_steps=max(min(round(train.decay_share * length), length - warmup), 1),
            lr_wsd_decay_style=train.decay_shape,
        )

    def with_settings(self, train: TrainSettings) -> "Schedule":
        """The schedule of another ``train`` section at the same position; it sets no learning rates."""
        other = Schedule(SimpleNamespace(param_groups=[]), train, self._updates_per_step, self._idle_steps)
        other.num_steps = self.num_steps
        return other

    def get_lr(self, param_group: dict) -> float:
        """The learning rate of the next update, for the highest and lowest rates of this parameter group."""
        return self._of_batch() * self._of_schedule(param_group)

    def _of_batch(self) -> float:
        """The factor of the learning rate in the next step, of which the batch may be smaller (``batch_ramp_lr``)."""
        if self._power == 0:
            return 1.0
        step = self.num_steps // self._updates_per_step + self._idle_steps + 1
        rows, most = self._train.rows_of(step), self._train.global_batch_size
        return (required(rows, _ROWS) / required(most, _ROWS)) ** self._power

    def _of_schedule(self, param_group: dict) -> float:
        highest: float = param_group.get("max_lr") or self.max_lr
        if self._table:
            at, factors = zip(*self._table, strict=True)
            return highest * float(np.interp(self.num_steps / self._updates_per_step, at, factors))
        if self._restarts and self.lr_warmup_steps < self.num_steps < self.lr_decay_steps:
            return self._restarted(param_group, highest)
        return super().get_lr(param_group)

    def _restarted(self, param_group: dict, highest: float) -> float:
        """The rate at the same place of a single cosine, of which each of the equal parts is a copy."""
        done, whole = self.num_steps, self.lr_decay_steps - self.lr_warmup_steps
        place = (done - self.lr_warmup_steps) * (self._restarts + 1) % whole  # in updates of a cosine of full length
        try:
            self.num_steps = self.lr_warmup_steps + place
            return highest if place == 0 else super().get_lr(param_group)
        finally:
            self.num_steps = done
