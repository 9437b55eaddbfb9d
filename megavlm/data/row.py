"""A rendered sample, and the row of packed samples that is one micro-batch. All tensors are on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megavlm.data.positions import grid_interpolation, patch_coordinates
from megavlm.records.skipped_samples import SkippedSample

IGNORE = -100  # label of a position without a target (torch's convention)
PIXEL_SCALE = torch.full((2, 3), 127.5)  # of the released processors: 0 … 255 becomes -1 … 1


@dataclass(frozen=True, kw_only=True)
class SampledAnswer:
    """What is known of an answer that the model has sampled, and that it learns from.

    Attributes:
        advantage: how much better it is than was to be expected; every token of the answer has this advantage. With
            ppo, its reward, from which the advantages of its tokens are computed.
        logprobs: float32 [n], log-probability of each target when it was sampled, at the temperature of sampling.
        number: number of the answer among those that were packed together.
        routing: the experts of the tokens of its prompt and of its own tokens, or of both together (see
            ``megavlm.runtime.routing``); None: the model chooses them.
    """

    advantage: float
    logprobs: Tensor
    number: int
    routing: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The record of a prompt, for rewards and readers.

    Attributes:
        columns: its fields, as written.
        question: its last message as text.
        media: its pictures, then its videos, as it names them.
        reference: its reference answer, if it has one.
    """

    columns: dict[str, Any]
    question: str
    media: list[Any]
    reference: str | None

    @property
    def fields(self) -> dict[str, Any]:
        """What rewards get: the columns and, as ``answer``, the reference answer unless there is such a column."""
        return {"answer": self.reference, **self.columns} if self.reference is not None else self.columns


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Inputs of a loss other than tokens; a field is None if it does not apply to the sample.

    Attributes:
        side: for an answer of a preference pair, "chosen" or "rejected".
        number: for a rejected answer, its number among those of its prompt, which follow the chosen one.
        margin: for a chosen answer, the margin by which it is preferred.
        desirable: for a judged answer (KTO), whether it is desirable.
        mismatched: whether the answer belongs to another prompt (for the KL term of KTO).
        ref_logprob: log-probability of the whole answer under the reference model.
        sampled: for an answer that the model has sampled, what is known of it.
        asked: for a prompt, its record.
    """

    side: Literal["chosen", "rejected"] | None = None
    number: int = 0
    margin: float | None = None
    desirable: bool | None = None
    mismatched: bool = False
    ref_logprob: float | None = None
    sampled: SampledAnswer | None = None
    asked: Asked | None = None

    @property
    def is_further_answer(self) -> bool:
        """Whether the sample is a further answer of its record; a record is counted by its first answer."""
        return self.mismatched or self.side == "rejected"


NO_ANNOTATIONS = Annotations()


@dataclass(kw_only=True)
class Sample:
    """One rendered sample of t tokens, P patches, F frames (a frame is one temporal step of a picture or video).

    Attributes:
        input_ids: int64 [t].
        labels: int64 [t], the token to be predicted **at** each position (already shifted by one); ``IGNORE`` where
            there is none. The last label is always ``IGNORE``.
        loss_weights: float32 [t], weight of each position in the loss; 0 where the label is ``IGNORE``.
        position_ids: int64 [3, t], rotary positions in time, height, width.
        pixels: uint8 [Q, channels * patch * patch], the resized pixels, frame by frame in text order, each frame image
            by image, each image patch by patch in the processor's order. They are normalised on the device.
        frame_images: int32 [F], images of each frame: 1 for a picture, which the tower sees twice; those of a temporal
            step for a video. Times the patches of the frames they sum to Q.
        frame_grids: int32 [F, 2], patches per column and per row (h, w) of each frame; the products sum to P.
        visual_positions: int64 [P / merge**2], index in ``input_ids`` of each visual token, in patch order.
        num_images: number of pictures in the sample.
        num_videos: number of videos in the sample.
        source: "file:line", for error messages.
        index: number of the sample in its file, from 0.
        source_id: number of its source in the blend.
        shares_media: the sample uses the pictures and videos of the sample before it in the row; ``pixels`` is empty.
        annotations: inputs of the loss other than tokens.
        remarks: see ``Draft``.
        pixel_scale: float32 [2, channels], what is subtracted from each pixel, and then divides it; the same for all
            samples of a run.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    pixels: Tensor
    frame_images: Tensor
    frame_grids: Tensor
    visual_positions: Tensor
    num_images: int
    num_videos: int
    source: str
    index: int
    source_id: int = 0
    shares_media: bool = False
    annotations: Annotations = NO_ANNOTATIONS
    remarks: tuple[str, ...] = ()
    pixel_scale: Tensor = PIXEL_SCALE


def padded_length(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple


@dataclass(kw_only=True)
class Row:
    """One micro-batch: whole samples one after another, followed by padding up to exactly T tokens.

    The tensors of ``Sample`` are concatenated ([T], [3, T], [P, …], …); ``visual_positions`` are indices in the row.
    Padding has token ``pad_id``, label ``IGNORE``, weight 0 and position 0. A sample that shares the pictures of the
    sample before it has its own visual tokens, but the row contains their frames only once. Further attributes:

    Attributes:
        use_frames: int64 [U], the frame of each run of visual tokens, in the order of the row.
        annotations: inputs of the loss other than tokens, for each sample.
        cu_seqlens: int32 [S + 1], the start of each segment, and T at the end. The first ``num_samples`` segments are
            the samples, each with its own padding; padding at the end of the row is one more segment.
        sample_lengths: tokens of each sample, without padding.
        num_samples: number of samples in the row.
        num_tokens: number of tokens that are not padding.
        num_targets: number of positions with a label.
        patch_coords: int32 [P, 2], row and column of each patch in its frame, for the tower's rotary angles.
        pos_index: int32 [P, 4], the four corners of the learned position grid around each patch.
        pos_weight: float32 [P, 4], the interpolation weights of these corners.
        sources: "file:line" of each sample.
        indices: number of each sample in its file.
        source_ids: number of each sample's source in the blend.
        remarks: those of all samples.
        skipped_samples: samples that were skipped since the previous row.
        newly_read: for each source, the number of samples of its first epoch that were read since the worker's previous
            row; these are distinct samples. [] if the row does not come from files.
        loader_state: state of the worker that made the row, after this row (see ``RowDataset``).
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    pixels: Tensor
    frame_images: Tensor
    frame_grids: Tensor
    visual_positions: Tensor
    use_frames: Tensor
    cu_seqlens: Tensor
    sample_lengths: list[int]
    patch_coords: Tensor
    pos_index: Tensor
    pos_weight: Tensor
    num_samples: int
    num_tokens: int
    num_targets: int
    num_images: int
    num_videos: int
    sources: list[str]
    indices: list[int]
    source_ids: list[int]
    annotations: list[Annotations]
    remarks: list[str] = field(default_factory=list)
    skipped_samples: list[SkippedSample] = field(default_factory=list)
    newly_read: list[int] = field(default_factory=list)
    loader_state: dict | None = None
    pixel_scale: Tensor = PIXEL_SCALE

    @property
    def segment_lengths(self) -> list[int]:
        """Tokens of each segment (padded samples, then padding at the end if there is any); sums to T."""
        return self.cu_seqlens.diff().tolist()

    def is_padding(self) -> Tensor:
        """bool [T], true for padding tokens."""
        padding = torch.ones(len(self.input_ids), dtype=torch.bool)
        for start, length in zip(self.cu_seqlens.tolist(), self.sample_lengths, strict=False):
            padding[start : start + length] = False
        return padding

    @property
    def frame_lengths(self) -> list[int]:
        """Patches of each frame; sums to P."""
        return self.frame_grids.prod(dim=1).tolist()


def pack(
    samples: Sequence[Sample],
    seq_length: int,
    *,
    pad_id: int,
    grid_side: int,
    merge: int,
    pad_multiple: int = 1,
    pixels: Tensor | None = None,
) -> Row:
    """Pack samples into one row of exactly `seq_length` tokens.

    Args:
        samples: at least one sample; together, with the padding of each, they have at most `seq_length` tokens.
        seq_length: number of tokens T of the row.
        pad_id: token id of padding.
        grid_side: side of the tower's learned position grid.
        merge: patches per side that are merged into one visual token.
        pad_multiple: each sample is padded to a multiple of this many tokens; it divides `seq_length`.
        pixels: the pixels of all samples if they are already concatenated; None: they are copied into one tensor.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.cumsum([0, *(padded_length(length, pad_multiple) for length in lengths)])
    used = int(starts[-1])
    assert samples, "a row holds at least one sample"
    assert used <= seq_length, f"{used} tokens do not fit a row of {seq_length}"
    assert seq_length % pad_multiple == 0, f"rows of {seq_length} tokens, samples padded to {pad_multiple}"

    def tokens(name: str, fill: float) -> Tensor:
        """Field `name` of all samples along the token axis (the last), padded with `fill`."""
        first = getattr(samples[0], name)
        row = first.new_full((*first.shape[:-1], seq_length), fill)
        for sample, start, length in zip(samples, starts, lengths, strict=False):
            row[..., start : start + length] = getattr(sample, name)
        return row

    frame_grids = torch.cat([sample.frame_grids for sample in samples if not sample.shares_media])
    grids = frame_grids.numpy()
    coordinates = patch_coordinates(grids, merge)
    pos_index, pos_weight = grid_interpolation(grids, coordinates, grid_side)
    labels = tokens("labels", IGNORE)
    return Row(
        input_ids=tokens("input_ids", pad_id),
        labels=labels,
        loss_weights=tokens("loss_weights", 0.0),
        position_ids=tokens("position_ids", 0),
        pixels=torch.cat([sample.pixels for sample in samples]) if pixels is None else pixels,
        frame_images=torch.cat([sample.frame_images for sample in samples if not sample.shares_media]),
        frame_grids=frame_grids,
        visual_positions=torch.cat(
            [sample.visual_positions + int(start) for sample, start in zip(samples, starts, strict=False)]
        ),
        use_frames=_use_frames(samples),
        cu_seqlens=torch.tensor([*starts, seq_length] if used < seq_length else starts, dtype=torch.int32),
        sample_lengths=lengths,
        patch_coords=torch.from_numpy(coordinates),
        pos_index=torch.from_numpy(pos_index),
        pos_weight=torch.from_numpy(pos_weight),
        num_samples=len(samples),
        num_tokens=sum(lengths),
        num_targets=int((labels != IGNORE).sum()),
        num_images=sum(sample.num_images for sample in samples if not sample.shares_media),
        num_videos=sum(sample.num_videos for sample in samples if not sample.shares_media),
        sources=[sample.source for sample in samples],
        indices=[sample.index for sample in samples],
        source_ids=[sample.source_id for sample in samples],
        annotations=[sample.annotations for sample in samples],
        remarks=[remark for sample in samples for remark in sample.remarks],
        pixel_scale=samples[0].pixel_scale,
    )


def _use_frames(samples: Sequence[Sample]) -> Tensor:
    uses: list[int] = []
    own, num_frames = range(0), 0
    for sample in samples:
        if not sample.shares_media:
            own = range(num_frames, num_frames + len(sample.frame_grids))
            num_frames = own.stop
        uses += own
    return torch.tensor(uses, dtype=torch.int64)
