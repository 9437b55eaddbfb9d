"""The section train.profile: which steps torch's profiler records, and on which ranks."""

from typing import Annotated

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Int, Section


class ProfileSettings(Section):
    """Traces of single steps by torch's profiler."""

    start: Int | None = Field(
        None,
        ge=1,
        description="first step that torch's profiler records; OUTPUT/profile then has a trace for each rank, which "
        "Perfetto and chrome://tracing show. null: no step",
    )
    steps: Int = Field(2, ge=1, le=100, description="number of steps that are recorded")
    ranks: list[Annotated[Int, Field(ge=0)]] = Field([0], min_length=1, description="ranks that record them")

    @property
    def last(self) -> int:
        """The last step that is recorded; 0 if none is."""
        return self.start + self.steps - 1 if self.start is not None else 0

    @model_validator(mode="after")
    def _consistent(self) -> "ProfileSettings":
        for name in ("steps", "ranks"):
            if self.start is None and self.is_changed(name):
                raise UserError(
                    f"train.profile.{name} is {getattr(self, name)}, but train.profile.start is null: it would be "
                    "ignored",
                    f"set train.profile.start to the first step to record, or remove {name}",
                )
        return self
