"""A rendered sample without its pixels: what packing needs, at a few kilobytes each."""

from dataclasses import dataclass, field

import numpy as np

from megavlm.data.processor import Clip, Still
from megavlm.data.row import NO_ANNOTATIONS, Annotations, padded_length


@dataclass(kw_only=True)
class Draft:
    """A sample without pixels, in which a single token represents all visual tokens of a frame.

    Attributes:
        token_ids: int32 [s].
        repeats: int32 [s], 1 for text tokens; for the token of a frame, its number of visual tokens.
        weights: float32 [s], loss weight of each token as a target, 0 if it is not a target.
        frame_grids: int32 [F, 2], patches (h, w) of each frame in text order.
        frame_images: int32 [F], see ``Sample``.
        media: pictures and videos in text order.
        length: number of tokens t of the sample.
        source: "file:line".
        index: number of the sample in its file.
        source_id: number of its source in the blend.
        shares_media: see ``Sample``.
        annotations: see ``Sample``.
        remarks: what was done to the sample and is worth telling, names of ``remarks.WORDS``.
        room: number of tokens of the row for which it was drafted, if that changes during a run; otherwise 0.
        followers: samples that come after it in the same row and share its media: other answers to the same prompt.
    """

    token_ids: np.ndarray
    repeats: np.ndarray
    weights: np.ndarray
    frame_grids: np.ndarray
    frame_images: np.ndarray
    media: list[Still | Clip]
    length: int
    source: str
    index: int
    source_id: int = 0
    shares_media: bool = False
    annotations: Annotations = NO_ANNOTATIONS
    remarks: tuple[str, ...] = ()
    room: int = 0
    followers: list["Draft"] = field(default_factory=list)

    @property
    def answers(self) -> tuple["Draft", ...]:
        """The sample and its followers."""
        return (self, *self.followers)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the sample with all its answers."""
        return sum(answer.length for answer in self.answers)

    @property
    def num_patches(self) -> int:
        """Number of patches P whose pixels must be read for the sample."""
        return 0 if self.shares_media else int(self.frame_grids.prod(axis=1).sum())

    @property
    def num_pixel_rows(self) -> int:
        """Number of rows Q of its ``pixels``."""
        return 0 if self.shares_media else int((self.frame_grids.prod(axis=1) * self.frame_images).sum())

    def padded_length(self, multiple: int) -> int:
        """Number of tokens in the row, including padding, of this sample and its followers."""
        return sum(padded_length(draft.length, multiple) for draft in (self, *self.followers))


class DraftError(Exception):
    """The pixels of draft number ``place`` could not be read; ``__cause__`` is the reason."""

    def __init__(self, place: int):
        super().__init__(place)
        self.place = place
