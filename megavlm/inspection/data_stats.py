"""Statistics of the inspected samples of each source, and an estimate of how full packed rows of the blend are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavlm.config.settings import DataSettings
from megavlm.data.draft import Draft
from megavlm.data.packing import first_fill, next_fill, take_row
from megavlm.data.processor import Clip, Still
from megavlm.data.renderer import Renderer
from megavlm.data.sample_order import SampleOrder
from megavlm.records.skipped_samples import BROKEN, NO_TARGET, TOO_LONG, SkippedSample
from megavlm.sources.blend import Source

PERCENTILES = (1, 25, 50, 75, 99)
KINDS = (BROKEN, TOO_LONG, NO_TARGET)
_PACKED_ROWS = 200


@dataclass
class Look:
    """The inspected samples of a source in file order; each is a draft, or a skipped sample with its cause."""

    source: Source
    samples: list[Draft | SkippedSample]

    @property
    def drafts(self) -> list[Draft]:
        """The samples that can be used."""
        return [sample for sample in self.samples if isinstance(sample, Draft)]

    @property
    def skipped_samples(self) -> list[SkippedSample]:
        """The samples that are skipped."""
        return [sample for sample in self.samples if isinstance(sample, SkippedSample)]


@dataclass
class Spread:
    """Mean, percentiles (interpolated between samples) and maximum of a number that each sample has."""

    mean: float
    percentiles: dict[int, float]
    max: float

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        """The spread of at least one value."""
        return cls(
            mean=float(np.mean(values)),
            percentiles={p: float(np.percentile(values, p)) for p in PERCENTILES},
            max=float(np.max(values)),
        )

    @property
    def texts(self) -> list[str]:
        """Mean, percentiles and maximum as text."""
        return [decimal(value) for value in (self.mean, *self.percentiles.values(), self.max)]


@dataclass
class SourceStats:
    """Statistics of one source. All except ``count`` and ``share`` are computed from the inspected samples.

    Attributes:
        name: the name of the source.
        path: the path of its file or folder.
        form: the foreign form of its records; None: megavlm's own.
        share: its share of the samples of the blend, 0 to 1, from the settings.
        token_share: its estimated share of the tokens of the blend; None if no sample can be used.
        target_share: its estimated share of the targets of the blend; None if no sample can be used.
        max_tokens: number of tokens after which it ends; None: no limit.
        count: number of samples in the source.
        looked_at: number of inspected samples.
        usable: number of inspected samples that can be used. The following statistics are of these samples; they are
            None if there are none.
        tokens: tokens of a sample; those of a pair are the tokens of both answers, each with the prompt.
        targets: targets of a sample.
        visual: visual tokens of a sample.
        targets_of_tokens: share of targets among all tokens.
        visual_of_tokens: share of visual tokens among all tokens.
        pictures: pictures of a sample.
        picture_size: median width and median height of processed pictures in pixels; None if there are no pictures.
        videos: videos of a sample.
        video_frames: median number of frames sampled from a video; None if there are no videos.
        dropped: the skipped samples by kind: (sample, cause) of each.
        remarks: number of samples about which each remark was made (see ``data/remarks.py``).
    """

    name: str
    path: str
    form: str | None
    share: float
    token_share: float | None
    target_share: float | None
    max_tokens: int | None
    count: int
    looked_at: int
    usable: int
    tokens: Spread | None
    targets: Spread | None
    visual: Spread | None
    targets_of_tokens: float | None
    visual_of_tokens: float | None
    pictures: Spread | None
    picture_size: tuple[float, float] | None
    videos: Spread | None
    video_frames: float | None
    dropped: dict[str, list[tuple[str, str]]]
    remarks: dict[str, int]

    @property
    def limit_text(self) -> str:
        """``limit_text`` of the source."""
        mean = self.tokens.mean * self.usable / self.looked_at if self.tokens else 0
        return limit_text(self.max_tokens, mean * self.count)

    @property
    def size_text(self) -> str:
        """The picture size as "width × height"; "" if there are no pictures."""
        return " × ".join(f"{side:,.0f}" for side in self.picture_size or ())

    @property
    def num_dropped(self) -> int:
        """Number of skipped samples."""
        return self.looked_at - self.usable


@dataclass
class RowStats:
    """Statistics of rows that were packed from the inspected samples.

    Attributes:
        fill: mean share of the tokens of a row that are not padding.
        samples: mean number of samples in a row; a pair is one sample.
        patches: number of patches in a row.
        rows: number of packed rows.
        work: means over the rows of what their operations follow from: tokens, target_tokens, segment_squares (of the
            tokens of each answer), patches, frame_squares (of the patches of each frame).
        heaviest: the samples of the row with most patches, or else most tokens: the number of ``tokens`` of each of its
            answers, and the ``frames`` of its media in patches, [height, width] each.
    """

    fill: float
    samples: float
    patches: Spread
    rows: int
    work: dict[str, float]
    heaviest: list[dict[str, Any]]


def num_targets(draft: Draft) -> int:
    """Number of target tokens of the sample with all its answers; the first token of an answer is never a target."""
    return sum(int(np.count_nonzero(answer.weights[1:])) for answer in draft.answers)


def num_visual(draft: Draft, renderer: Renderer) -> int:
    """Number of visual tokens of the sample; each of its answers has those of the prompt."""
    return len(draft.answers) * draft.num_patches // renderer.vision.merge**2


def blend_stats(looks: Sequence[Look], renderer: Renderer) -> list[SourceStats]:
    """The statistics of each source.

    The share of tokens of a source is its share of samples times their mean length, where skipped samples count with
    length 0: a source of which half is broken gives half as many tokens.
    """
    tokens = [look.source.share * sum(draft.num_tokens for draft in look.drafts) / len(look.samples) for look in looks]
    targets = [look.source.share * sum(map(num_targets, look.drafts)) / len(look.samples) for look in looks]
    return [
        _source_stats(look, renderer, _share(tokens[place], sum(tokens)), _share(targets[place], sum(targets)))
        for place, look in enumerate(looks)
    ]


def _source_stats(look: Look, renderer: Renderer, token_share: float | None, target_share: float | None) -> SourceStats:
    drafts = look.drafts
    lengths, targets = [d.num_tokens for d in drafts], [num_targets(d) for d in drafts]
    visual = [num_visual(d, renderer) for d in drafts]
    stills = [[item for item in d.media if isinstance(item, Still)] for d in drafts]
    clips = [[item for item in d.media if isinstance(item, Clip)] for d in drafts]
    patch = renderer.processor.image_processor.patch_size
    sizes = [(patch * item.grid[2], patch * item.grid[1]) for of_sample in stills for item in of_sample]
    frames = [len(item.frames) for of_sample in clips for item in of_sample]
    dropped = {kind: [(f.sample, f.cause) for f in look.skipped_samples if f.kind == kind] for kind in KINDS}
    return SourceStats(
        name=look.source.name,
        path=look.source.file.path,
        form=look.source.file.form,
        share=look.source.share,
        token_share=token_share,
        target_share=target_share,
        max_tokens=look.source.max_tokens,
        count=len(look.source.file),
        looked_at=len(look.samples),
        usable=len(drafts),
        tokens=spread(lengths),
        targets=spread(targets),
        visual=spread(visual),
        targets_of_tokens=_share(sum(targets), sum(lengths)),
        visual_of_tokens=_share(sum(visual), sum(lengths)),
        pictures=spread([len(of_sample) for of_sample in stills]),
        picture_size=tuple(np.median(sizes, axis=0).tolist()) if sizes else None,
        videos=spread([len(of_sample) for of_sample in clips]),
        video_frames=float(np.median(frames)) if frames else None,
        dropped={kind: found for kind, found in dropped.items() if found},
        remarks=dict(Counter(remark for draft in drafts for remark in draft.remarks)),
    )


def pack_rows(looks: Sequence[Look], settings: DataSettings, pad_multiple: int, seed: int) -> RowStats | None:
    """Packs the inspected samples as a data worker does, repeatedly and in the proportions of the blend.

    Args:
        looks: the inspected samples of each source.
        settings: the ``data`` section: seq_length, packing, packing_buffer, max_patches_per_row, shuffle.
        pad_multiple: samples are padded to a multiple of this many tokens.
        seed: the seed of the order.

    Returns:
        The statistics of the rows; None if no sample can be used.
    """
    usable = [look for look in looks if look.drafts]
    if not usable:
        return None
    shares, counts = [look.source.share for look in usable], [len(look.samples) for look in usable]
    draws = SampleOrder(shares, counts, seed if settings.shuffle else None, 0, 1)
    buffer = settings.packing_buffer if settings.packing == "best_fit" else 1
    fill = first_fill(buffer)
    waiting: list[Draft] = []
    rows: list[list[Draft]] = []
    for _ in range(_PACKED_ROWS):
        while len(waiting) < fill:
            source, index = next(draws)
            if isinstance(sample := usable[source].samples[index], Draft):
                waiting.append(sample)
        fill = next_fill(fill, buffer)
        rows.append(take_row(waiting, settings.seq_length, pad_multiple, settings.max_patches_per_row))
    work = [_work(row) for row in rows]
    mean = {name: float(np.mean([of_row[name] for of_row in work])) for name in work[0]}
    heaviest = max(range(len(rows)), key=lambda place: (work[place]["patches"], work[place]["tokens"]))
    return RowStats(
        fill=mean["tokens"] / settings.seq_length,
        samples=float(np.mean([len(row) for row in rows])),
        patches=Spread.of([of_row["patches"] for of_row in work]),
        rows=_PACKED_ROWS,
        work=mean,
        heaviest=[
            {"tokens": [answer.length for answer in draft.answers], "frames": draft.frame_grids.tolist()}
            for draft in rows[heaviest]
        ],
    )


def _work(row: Sequence[Draft]) -> dict[str, int]:
    """What the operations of a row follow from; see ``RowStats.work``."""
    frames = [int(frame) for draft in row for frame in draft.frame_grids.prod(axis=1)]
    return {
        "tokens": sum(draft.num_tokens for draft in row),
        "target_tokens": sum(map(num_targets, row)),
        "segment_squares": sum(answer.length**2 for draft in row for answer in draft.answers),
        "patches": sum(frames),
        "frame_squares": sum(frame**2 for frame in frames),
    }


def limit_text(max_tokens: int | None, tokens: float) -> str:
    """When a source ends that has about so many tokens in all its samples; "" if it has no ``max_tokens``."""
    if max_tokens is None:
        return ""
    passes = f", about {max_tokens / tokens:.2g} passes over it" if tokens else ""
    return f"ends after {max_tokens:,} tokens (max_tokens){passes}"


def decimal(value: float) -> str:
    """A count or a mean of counts: 1,234 or 56 or 3.4."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def spread(values: Sequence[int]) -> Spread | None:
    """``Spread.of`` the values; None if there are none."""
    return Spread.of(values) if values else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
