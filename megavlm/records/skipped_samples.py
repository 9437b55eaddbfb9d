"""Samples that cannot be packed into a row: where each one is stored, and why it was skipped."""

from dataclasses import dataclass

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened

BROKEN = "broken"
"""A line, picture, video or shard that cannot be read or is invalid. Samples of all other kinds are valid."""
TOO_LONG = "too long"
NO_TARGET = "no target"


class UnfitSample(UserError):
    """A valid sample that cannot be put into a row; ``kind`` gives the reason (``TOO_LONG`` or ``NO_TARGET``)."""

    def __init__(self, kind: str, message: str, remedy: str):
        super().__init__(message, remedy)
        self.kind = kind

    def __reduce__(self) -> tuple:  # exceptions are pickled when they are sent to other processes
        return type(self), (self.kind, self.message, self.remedy)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped.

    Attributes:
        source_id: the number of its source in the blend.
        sample: "file:line" or "shard:number".
        kind: ``BROKEN``, ``TOO_LONG`` or ``NO_TARGET``.
        cause: the reason in words.
    """

    source_id: int
    sample: str
    kind: str
    cause: str

    @classmethod
    def of(cls, source_id: int, sample: str, error: BaseException | None) -> "SkippedSample":
        """The skipped sample for the error that was raised while it was read or rendered."""
        kind = error.kind if isinstance(error, UnfitSample) else BROKEN
        cause = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {shortened(error)}"
        return cls(source_id, sample, kind, cause.removeprefix(f"{sample}: "))
