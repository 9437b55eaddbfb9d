"""Samples that cannot be packed into a row: where each one is stored, why it was skipped, and how many are too many."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megavlm.base.errors import UserError
from megavlm.base.number_format import percent
from megavlm.base.quoting import shortened

BROKEN = "broken"
"""A line, picture, video or shard that cannot be read or is invalid. Samples of all other kinds are valid."""
TOO_LONG = "too long"
NO_TARGET = "no target"
TOO_LONG_YET = "too long yet"
"""Unfit for the shorter rows of ``data.length_ramp``, but fit for those after it. No limit counts it."""
_WORDS = {
    BROKEN: "broken",
    TOO_LONG: "too long for a row",
    NO_TARGET: "without a target",
    TOO_LONG_YET: "too long for the rows of data.length_ramp",
}
# The kinds that each limit is for, and what can be done where there are more.
_CAUSES = 5  # groups of causes that are shown
_LIMITED = {"data.max_bad_fraction": (BROKEN,), "data.max_dropped_fraction": (TOO_LONG, NO_TARGET)}
_REMEDIES = {
    "data.max_bad_fraction": "repair them in their places (a file must keep its number of samples), or raise "
    "data.max_bad_fraction; a run that has begun is then continued by the same command",
    "data.max_dropped_fraction": "raise data.max_dropped_fraction if they may be left out; a run that has begun is "
    "then continued by the same command. To train on what is too long, start a run with a larger data.seq_length, a "
    "smaller data.max_pixels, or data.too_long=truncate",
}


class UnfitSample(UserError):
    """A valid sample that cannot be put into a row; ``kind`` gives the reason (not ``BROKEN``)."""

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
        kind: ``BROKEN``, ``TOO_LONG``, ``NO_TARGET`` or ``TOO_LONG_YET``.
        cause: the reason in words.
        index: the number of the sample in its source, from 0.
        remedy: what the user can do about it, if that is known.
    """

    source_id: int
    sample: str
    kind: str
    cause: str
    index: int = 0
    remedy: str | None = None

    @classmethod
    def of(cls, source_id: int, sample: str, error: BaseException | None, index: int = 0) -> "SkippedSample":
        """The skipped sample for the error that was raised while it was read or rendered."""
        kind = error.kind if isinstance(error, UnfitSample) else BROKEN
        remedy = error.remedy if isinstance(error, UserError) else None
        cause = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {shortened(error)}"
        return cls(source_id, sample, kind, cause.removeprefix(f"{sample}: "), index, remedy)


@dataclass(frozen=True)
class Excess:
    """More samples of a source than allowed are skipped.

    Attributes:
        kinds: the kinds of samples of which there are too many.
        limit: the fraction that is allowed.
        text: how many there are and which limit they exceed, to follow "of N samples, ".
        remedy: what the user can do.
    """

    kinds: tuple[str, ...]
    limit: float
    text: str
    remedy: str


def excess(kinds: Mapping[str, int], looked_at: int, limits: Mapping[str, float]) -> Excess | None:
    """Which limit the skipped samples of a source exceed; None if they exceed none.

    Args:
        kinds: the number of distinct skipped samples of each kind.
        looked_at: the number of distinct samples that were looked at, including these.
        limits: ``DataSettings.skip_limits``.
    """
    for name, limited in _LIMITED.items():
        counted = {kind: count for kind, count in kinds.items() if kind in limited}
        if sum(counted.values()) > limits[name] * looked_at:
            text = f"{shares(counted, looked_at)}: more than {name} = {limits[name]:g}"
            return Excess(limited, limits[name], text, _REMEDIES[name])
    return None


def shares(kinds: Mapping[str, int], looked_at: int) -> str:
    """The number and share of each kind: "4 are broken (7.7 %), 1 is too long for a row (1.9 %)"; "" for none."""
    return ", ".join(
        f"{count:,} {'is' if count == 1 else 'are'} {_WORDS[kind]} ({percent(count / max(looked_at, count))})"
        for kind in _WORDS
        if (count := kinds.get(kind, 0))
    )


def grouped(samples: Sequence[SkippedSample]) -> list[tuple[SkippedSample, int]]:
    """Skipped samples grouped by their causes: the first of each group and the size of the group, largest first.

    Causes that differ only in numbers and in the names of files are one group.
    """
    groups: dict[tuple[str, str], list[SkippedSample]] = {}
    for sample in samples:
        alike = re.sub(r"\S*[/.]\S+|\d+|'[^']*'", "…", sample.cause)
        groups.setdefault((sample.kind, alike), []).append(sample)
    return sorted(((group[0], len(group)) for group in groups.values()), key=lambda found: -found[1])


def causes(skipped: Sequence[SkippedSample]) -> list[str]:
    """Lines about skipped samples: each cause once, with the number of samples, the first one, and the remedy."""
    groups = grouped(skipped)
    lines = []
    for first, count in groups[:_CAUSES]:
        where = first.sample if count == 1 else f"first {first.sample}"
        lines.append(f"  {count:,} × {first.kind}: {first.cause} ({where})")
        lines += [f"    → {first.remedy}"] if first.remedy else []
    if len(groups) > _CAUSES:
        lines.append(f"  and {len(groups) - _CAUSES:,} more causes")
    return lines
