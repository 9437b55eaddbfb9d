"""What a step is assumed to contain: rows full of samples of equal length, or rows such as those of some data."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from megavlm.align.registry import METHODS
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.config.settings import Settings
from megavlm.data.row import Row, pack
from megavlm.data.synthetic_row import synthetic_samples
from megavlm.data.worker_speed import WorkerSpeed
from megavlm.model.flops import Work
from megavlm.model.shapes import Shapes, VisionShape

PIXELS = 1024 * 1024
"""Pixels of a picture unless ``data.max_pixels`` says otherwise."""


class Contents(Protocol):
    """The contents of rows."""

    @property
    def segments(self) -> int:
        """About the number of samples of a row, or of answers."""

    def row(self, settings: Settings, shapes: Shapes) -> Row:
        """Makes the row that needs most memory. Pixels are black; all tokens but the last of a sample are targets."""

    def mean_row(self, settings: Settings, shapes: Shapes) -> Row:
        """Makes a row with as much work as the mean row."""

    def work(self, rows: int, *, scores: bool = False) -> Work:
        """The work of this many rows. ``scores``: of a reward model, which computes no logits."""


def contents_of(
    settings: Settings,
    shapes: Shapes,
    verb: str,
    *,
    samples: int = 1,
    pictures: int | None = None,
    data: Path | None = None,
) -> "Mix | DataMix":
    """The contents of the rows of a run: those of ``data`` if it is given, otherwise full rows.

    Args:
        settings, shapes: the settings and the model.
        verb: a key of ``METHODS``.
        samples, pictures: see ``Mix.of``.
        data: summary.json of `megavlm data inspect`.

    Raises:
        UserError: ``data`` cannot be used, or is given together with ``samples`` or ``pictures``.
    """
    if data is not None:
        if samples != 1 or pictures is not None:
            raise UserError("--data says what the rows contain, as --samples and --pictures do", "leave out the others")
        return DataMix.of(data, settings, shapes)
    answers = 2 if METHODS[verb].kind in ("pair", "judged") or METHODS[verb].samples else 1
    return Mix.of(settings, shapes, samples=samples, pictures=pictures, answers=answers)


class _Sample(NamedTuple):
    """A sample: the number of tokens of each of its answers, how many there are (1 or 2), and its frames in patches."""

    length: int
    answers: int
    frames: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Mix:
    """The contents of each row.

    Attributes:
        samples: number of samples of a row; with ``answers`` 2, of pairs of answers that share their pictures.
        pictures: number of pictures of a sample.
        side: patches along each side of a picture.
        length: number of tokens of a sample (of each answer of a pair), the visual ones included.
        answers: 2 if the method compares answers, otherwise 1.
    """

    samples: int
    pictures: int
    side: int
    length: int
    answers: int

    @classmethod
    def of(
        cls, settings: Settings, shapes: Shapes, *, samples: int = 1, pictures: int | None = None, answers: int = 1
    ) -> "Mix":
        """The mix of these settings. ``pictures``: of a row; None: as many as fit. Both are rounded down to fit."""
        vision, pad_multiple = shapes.vision, settings.pad_multiple
        length = settings.data.seq_length // (samples * answers) // pad_multiple * pad_multiple
        edge = vision.patch_size * vision.spatial_merge_size  # pixels along each side of a visual token
        side = max(1, min(math.isqrt(settings.data.max_pixels or PIXELS) // edge, math.isqrt(max(length - 2, 1))))
        most = (length - 1) // (side**2 + 1)  # a token of text beside each picture
        wanted = most if pictures is None else min(most, pictures // samples)
        return cls(samples, wanted, side * vision.spatial_merge_size, length, answers)

    @property
    def segments(self) -> int:
        """See ``Contents``."""
        return self.samples * self.answers

    def row(self, settings: Settings, shapes: Shapes) -> Row:
        """See ``Contents``."""
        sample = _Sample(self.length, self.answers, [(self.side, self.side)] * self.pictures)
        return _pack([sample] * self.samples, settings, shapes)

    mean_row = row

    def work(self, rows: int, *, scores: bool = False) -> Work:
        """See ``Contents``."""
        patches = self.samples * self.pictures * self.side**2
        return Work(
            tokens=float(rows * self.segments * self.length),
            segment_squares=float(rows * self.segments * self.length**2),
            target_tokens=0.0 if scores else float(rows * self.segments * (self.length - 1)),
            patches=float(rows * patches),
            frame_squares=float(rows * patches * self.side**2),
        )

    def __str__(self) -> str:
        size = f"{self.side} × {self.side} patches"
        of = "pair of answers" if self.answers == 2 else "sample"
        return (
            f"each row has {self.samples} {of}{'s' * (self.samples > 1)} of {self.length:,} tokens, with "
            f"{self.pictures} picture{'s' * (self.pictures != 1)} of {size} each"
        )


@dataclass(frozen=True)
class DataMix:
    """Rows as `megavlm data inspect` has packed them from a part of the data.

    Attributes:
        work_of_row: means over the rows (``inspection.data_stats.RowStats.work``).
        heaviest: the samples of the row with most patches.
        file: where this is from.
        speed: that of a data worker with these data; None if it was not measured.
    """

    work_of_row: dict[str, float]
    heaviest: list[_Sample]
    file: str
    speed: WorkerSpeed | None = None

    @classmethod
    def of(cls, path: Path, settings: Settings, shapes: Shapes) -> "DataMix":
        """Reads summary.json. Raises UserError if it is something else, or of rows of another length."""
        again = "let megavlm data inspect write it again, with this configuration"
        try:
            found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
            length, rows = found["seq_length"], found["rows"]
            speed = WorkerSpeed(**measured) if (measured := found.get("worker")) else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = error.strerror if isinstance(error, OSError) else shortened(repr(error))
            raise UserError(f"--data {path} is not a summary.json of megavlm data inspect: {cause}", again) from None
        if length != settings.data.seq_length:
            raise UserError(
                f"--data {path} is of rows of {length} tokens, but data.seq_length is {settings.data.seq_length}", again
            )
        if rows is None or "heaviest" not in rows:
            why = "has no usable sample, or prompts, whose answers do not exist yet" if rows is None else "is too old"
            raise UserError(f"--data {path} {why}: it has no rows to plan with", again if rows else "leave out --data")
        merge, samples = shapes.vision.spatial_merge_size, []
        for sample in rows["heaviest"]:
            tokens, frames = sample["tokens"], [(int(h), int(w)) for h, w in sample["frames"]]
            if any(h % merge or w % merge for h, w in frames):
                raise UserError(f"--data {path} is of another model, which merges other numbers of patches", again)
            first = _Sample(sum(tokens) // len(tokens), 1, frames)
            samples += [first._replace(answers=min(len(tokens), 2))]
            samples += [first._replace(frames=())] * (len(tokens) - 2)
        return cls(rows["work"], samples, str(path), speed)

    @property
    def segments(self) -> int:
        """See ``Contents``."""
        return max(1, round(self.work_of_row["tokens"] ** 2 / self.work_of_row["segment_squares"]))

    def row(self, settings: Settings, shapes: Shapes) -> Row:
        """See ``Contents``."""
        return _pack(self.heaviest, settings, shapes)

    def mean_row(self, settings: Settings, shapes: Shapes) -> Row:
        """See ``Contents``. Samples and pictures have equal sizes, with about the same sums of squares."""
        work, merge, multiple = self.work_of_row, shapes.vision.spatial_merge_size, settings.pad_multiple
        count = self.segments
        length = max(multiple, int(work["tokens"] / count) // multiple * multiple)
        of_frame = work["frame_squares"] / work["patches"] if work["patches"] else merge**2
        side = max(1, round(math.sqrt(of_frame) / merge)) * merge
        side = min(side, math.isqrt(max(length - 1, 1)) * merge)
        most = (length - 1) // ((side // merge) ** 2)
        frames = round(work["patches"] / side**2)
        shares = [min(most, frames // count + (place < frames % count)) for place in range(count)]
        return _pack([_Sample(length, 1, [(side, side)] * share) for share in shares], settings, shapes)

    def work(self, rows: int, *, scores: bool = False) -> Work:
        """See ``Contents``."""
        of_row = self.work_of_row | ({"target_tokens": 0.0} if scores else {})
        return Work(**{name: rows * value for name, value in of_row.items()})

    def __str__(self) -> str:
        tokens, patches = self.work_of_row["tokens"], self.work_of_row["patches"]
        most = sum(h * w for sample in self.heaviest for h, w in sample.frames)
        return (
            f"rows as in {self.file}: {tokens:,.0f} tokens and {patches:,.0f} patches in the mean row, which decides "
            f"the work, and {most:,} patches in the heaviest, which decides the memory"
            + ("" if self.speed else "; how long a data worker takes for a row was not measured there")
        )


def _pack(samples: Iterable[_Sample], settings: Settings, shapes: Shapes) -> Row:
    """A row of such samples; their visual tokens come first."""
    fixed = tuple(sample._replace(frames=tuple(sample.frames)) for sample in samples)
    return _packed(fixed, settings.data.seq_length, settings.pad_multiple, shapes.vision)


@lru_cache(maxsize=4)  # a search plans many layouts with the same rows
def _packed(samples: tuple[_Sample, ...], seq_length: int, pad_multiple: int, vision: VisionShape) -> Row:
    merge, made = vision.spatial_merge_size, []
    for length, answers, frames in samples:
        grids = np.array(frames, dtype=np.int32).reshape(-1, 2)
        patches = int(grids.prod(axis=1).sum())
        made += synthetic_samples(
            torch.zeros(length, dtype=torch.int64),
            torch.zeros(patches, vision.patch_dim // vision.temporal_patch_size, dtype=torch.uint8),
            grids,
            np.arange(patches // merge**2),
            merge=merge,
            answers=answers,
        )
    return pack(made, seq_length, pad_id=0, grid_side=vision.grid_side, merge=merge, pad_multiple=pad_multiple)
