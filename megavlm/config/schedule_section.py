"""The settings of the train section that depend on the step: how long a run is, its batches and its learning rate."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Count, Float, Int, Section, Steps


class ScheduleSettings(Section):
    """The length of a run, and what changes from step to step."""

    steps: Int | None = Field(None, ge=1, description="number of optimizer steps of the whole run")
    epochs: Float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="instead of steps: number of passes over the training data, after which the run ends. Each sample "
        "is then used exactly so often; of a blend, so often as its sources' epochs say, or as its weights give when "
        "as many samples are read as all sources have",
    )
    global_batch_size: Int | None = Field(
        None, ge=1, description="number of rows in a step, summed over all data-parallel ranks"
    )
    batch_ramp: dict[Steps, Count] = Field(
        {},
        description="smaller numbers of rows at the beginning, each with the last step that has it: {100: 8, 200: 16} "
        "means 8 rows up to step 100 and 16 up to step 200; then global_batch_size",
    )
    batch_ramp_lr: Literal["constant", "sqrt", "linear"] = Field(
        "constant",
        description="only with batch_ramp: how lr depends on the number of rows. constant: not at all; "
        "sqrt: it is multiplied by √(rows / global_batch_size); linear: by rows / global_batch_size",
    )
    lr: Float | None = Field(None, gt=0, le=1000, description="maximum learning rate")
    min_lr: Float = Field(0.0, ge=0, le=1000, description="learning rate at the end of the schedule")
    warmup_steps: Int = Field(
        0, ge=0, description="number of steps over which the learning rate rises linearly from 0 (in step 1) to lr"
    )
    warmup_share: Float | None = Field(
        None, gt=0, lt=1, description="instead of warmup_steps: share of the steps of the schedule, for example 0.03"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "table"] = Field(
        "cosine",
        description="how the learning rate falls from lr to min_lr after the warm-up. constant: it stays at lr; wsd: "
        "it stays at lr and falls at the end; inverse_sqrt: it falls with the square root of the step and has no end; "
        "table: it follows schedule_table",
    )
    schedule_steps: Int | None = Field(
        None,
        ge=1,
        description="number of steps after which the learning rate has fallen to min_lr, where it then stays; null: "
        "steps (or the expected steps of epochs) at the first start of the run, also if the run is continued with more",
    )
    restarts: Int = Field(
        0,
        ge=0,
        le=1000,
        description="only for cosine: how often the learning rate jumps back to lr, after equal numbers of steps",
    )
    decay_share: Float = Field(
        0.1, gt=0, le=1, description="only for wsd: share of the schedule's steps in which the learning rate falls"
    )
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        "linear", description="only for wsd: how it falls; minus_sqrt: as 1 - √share, fast at first"
    )
    schedule_table: dict[Steps, Annotated[Float, Field(ge=0, le=1)]] = Field(
        {},
        description="only for table: factors of lr after so many steps, for example {0: 0, 100: 1, 1000: 0.1}, with "
        "straight lines between them; the last one stays",
    )

    @property
    def has_length(self) -> bool:
        """Whether the learning rate depends on the number of steps of the run."""
        return self.schedule in ("cosine", "linear", "wsd") or self.warmup_share is not None

    @property
    def length(self) -> int:
        """The number of steps of the schedule."""
        return self.schedule_steps or self.steps or 1

    @property
    def warmup(self) -> int:
        """The number of steps of the warm-up."""
        return self.warmup_steps if self.warmup_share is None else round(self.warmup_share * self.length)

    def rows_of(self, step: int) -> int | None:
        """The number of rows of a step (counted from 1) over all data-parallel ranks."""
        return value_at(self.batch_ramp, step, self.global_batch_size)

    @model_validator(mode="after")
    def _schedule_is_consistent(self) -> "ScheduleSettings":
        if self.lr is not None and self.min_lr > self.lr:
            raise UserError(
                f"train.min_lr is {self.min_lr:g}, which is greater than train.lr = {self.lr:g}",
                "lower min_lr or raise lr",
            )
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs:g}: one of them would be ignored",
                "set one of them to null",
            )
        for name in ("steps", "schedule_steps"):
            if (value := getattr(self, name)) is not None and self.warmup_steps > value:
                raise UserError(
                    f"train.warmup_steps is {self.warmup_steps}, which is greater than train.{name} = {value}",
                    f"lower warmup_steps or raise {name}",
                )
        self._nothing_is_ignored()
        if self.schedule == "table" and not self.schedule_table:
            raise UserError(
                "train.schedule is table, but train.schedule_table is empty",
                "give it factors of lr after so many steps: train.schedule_table={0: 0, 100: 1, 1000: 0.1}",
            )
        if self.schedule == "inverse_sqrt" and not self.warmup_steps and self.warmup_share is None:
            raise UserError(
                "train.schedule is inverse_sqrt, which falls with √(warm-up steps / step), but there is no warm-up",
                "set train.warmup_steps",
            )
        sizes = [*dict(sorted(self.batch_ramp.items())).values(), self.global_batch_size or 2**31]
        if 0 in self.batch_ramp or any(a >= b for a, b in pairwise(sizes)):
            raise UserError(
                f"train.batch_ramp is {self.batch_ramp}, and train.global_batch_size is {self.global_batch_size}: the "
                "numbers of rows must grow from entry to entry, and steps count from 1",
                "example: train.batch_ramp={100: 8, 200: 16} train.global_batch_size=32",
            )
        if self.batch_ramp and self.global_batch_size is None:
            raise UserError(
                f"train.batch_ramp is {self.batch_ramp}, but train.global_batch_size is not set: it would be ignored",
                "set train.global_batch_size, or remove batch_ramp",
            )
        if self.batch_ramp_lr != "constant" and not self.batch_ramp:
            raise UserError(
                f"train.batch_ramp_lr is {self.batch_ramp_lr}, but train.batch_ramp is empty: it would be ignored",
                "set train.batch_ramp, or remove batch_ramp_lr",
            )
        check_ramp("train.batch_ramp", self.batch_ramp, self.steps)
        return self

    def _nothing_is_ignored(self) -> None:
        """Raises UserError if a setting has no effect with the schedule or beside another setting."""
        unused = {
            "schedule_steps": (self.has_length or bool(self.epochs), "cosine, linear or wsd"),
            "min_lr": (self.schedule not in ("constant", "table"), "cosine, linear, wsd or inverse_sqrt"),
            "restarts": (self.schedule == "cosine", "cosine"),
            "decay_share": (self.schedule == "wsd", "wsd"),
            "decay_shape": (self.schedule == "wsd", "wsd"),
            "schedule_table": (self.schedule == "table", "table"),
            "warmup_steps": (self.schedule != "table", "any other than table"),
            "warmup_share": (self.schedule != "table", "any other than table"),
        }
        for name, (is_used, schedules) in unused.items():
            if not is_used and self.is_changed(name):
                value = getattr(self, name)
                given = f"{value:g}" if isinstance(value, float) else value
                raise UserError(
                    f"train.{name} is {given}, but train.schedule is {self.schedule}: it would be ignored",
                    f"remove {name}, or choose schedule {schedules}",
                )
        if self.warmup_share is not None and self.warmup_steps:
            raise UserError(
                f"train.warmup_steps is {self.warmup_steps} and train.warmup_share is {self.warmup_share:g}: one of "
                "them would be ignored",
                "remove one of them",
            )


def check_ramp(key: str, ramp: Mapping[int, int], steps: int | None) -> None:
    """Raises UserError if a table {last step: value} does not end before the run."""
    if steps is not None and max(ramp, default=0) >= steps:
        raise UserError(
            f"{key} is {ramp}, but train.steps is {steps}: the run would end before the ramp",
            "let its last entry end earlier, or raise train.steps",
        )


def value_at[T](table: Mapping[int, int], step: int, afterwards: T) -> int | T:
    """The entry of a table {last step: value} for a step, from 1; ``afterwards`` behind the last entry."""
    return next((value for last, value in sorted(table.items()) if step <= last), afterwards)
