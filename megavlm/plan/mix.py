"""What a step is assumed to contain: rows full of samples of equal length, with pictures of equal size."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.config.settings import Settings
from megavlm.data.row import Row, pack
from megavlm.data.synthetic_row import synthetic_samples
from megavlm.model.flops import Work
from megavlm.model.shapes import Shapes

PIXELS = 1024 * 1024
"""Pixels of a picture unless ``data.max_pixels`` says otherwise."""


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

    def row(self, settings: Settings, shapes: Shapes) -> Row:
        """Makes such a row. All tokens but the last of each sample are targets; pixels are black."""
        vision = shapes.vision
        merge, num_patches = vision.spatial_merge_size, self.pictures * self.side**2
        rows = [
            sample
            for _ in range(self.samples)
            for sample in synthetic_samples(
                torch.zeros(self.length, dtype=torch.int64),
                torch.zeros(num_patches, vision.patch_dim // vision.temporal_patch_size, dtype=torch.uint8),
                np.array([(self.side, self.side)] * self.pictures, dtype=np.int32).reshape(-1, 2),
                np.arange(num_patches // merge**2),
                merge=merge,
                answers=self.answers,
            )
        ]
        return pack(
            rows,
            settings.data.seq_length,
            pad_id=0,
            grid_side=vision.grid_side,
            merge=merge,
            pad_multiple=settings.pad_multiple,
        )

    def work(self, rows: int, *, scores: bool = False) -> Work:
        """The work of this many rows. ``scores``: of a reward model, which computes no logits."""
        segments, patches = self.samples * self.answers, self.samples * self.pictures * self.side**2
        return Work(
            tokens=float(rows * segments * self.length),
            segment_squares=float(rows * segments * self.length**2),
            target_tokens=0.0 if scores else float(rows * segments * (self.length - 1)),
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
