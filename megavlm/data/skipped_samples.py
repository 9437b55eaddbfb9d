"""Samples that reach no row: what was wrong with them, and where they lie."""

from dataclasses import dataclass

from megavlm.base.errors import UserError

BROKEN = "broken"
"""A line, picture, video or shard that cannot be read or makes no sample. All other kinds are sound samples."""
TOO_LONG = "too long"
NO_TARGET = "no target"


class UnfitSample(UserError):
    """A sound sample that has no place in a row: ``kind`` says why (``TOO_LONG``, ``NO_TARGET``)."""

    def __init__(self, kind: str, message: str, remedy: str):
        super().__init__(message, remedy)
        self.kind = kind

    def __reduce__(self) -> tuple:  # it goes to other processes
        return type(self), (self.kind, self.message, self.remedy)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was passed over.

    Attributes:
        source_id: number of its source in the blend.
        sample: "file:line", or shard and key.
        kind: ``BROKEN``, ``TOO_LONG`` or ``NO_TARGET``.
        cause: in words.
    """

    source_id: int
    sample: str
    kind: str
    cause: str

    @classmethod
    def of(cls, source_id: int, sample: str, error: Exception) -> "SkippedSample":
        kind = error.kind if isinstance(error, UnfitSample) else BROKEN
        cause = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return cls(source_id, sample, kind, cause.removeprefix(f"{sample}: "))
