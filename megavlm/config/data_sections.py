"""The data section: the files to read, the blend of sources, and the packing of samples into rows of tokens."""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Bool, Count, FilePath, Float, Int, Section, Steps, Str
from megavlm.config.source_section import DataSource as DataSource
from megavlm.config.source_section import EvalSource, check_blend, leaves_of

# Protocols that may be allowed as a whole: where a name inside the network is no risk, or is checked. For all others,
# the host must be named.
_WHOLE_PROTOCOLS = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory")


def check_media_protocols(entries: Iterable[str]) -> None:
    """Raises UserError unless each entry of ``data.media_protocols`` is a protocol or has the form protocol://host."""
    for entry in entries:
        if entry not in _WHOLE_PROTOCOLS and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+.-]*://[^/?#\s]+", entry):
            raise UserError(
                f"{quoted(entry)} is neither protocol://host nor one of the protocols {', '.join(_WHOLE_PROTOCOLS)}",
                "examples: https, s3://bucket, http://images.local:8080",
            )


# The settings that decide how large pictures and videos are in a row; null: the value of the model's processor.
LIMITS = (
    *("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "video_max_pixels_per_frame"),
    *("video_fps", "video_max_frames"),
)


class ReplaySettings(Section):
    """Samples of an earlier training stage, mixed in so that the model does not forget it."""

    sources: list[DataSource] = Field(min_length=1, description="sources, as in data.train")
    share: Float = Field(
        0.3, gt=0, lt=1, description="fraction of all samples that come from these sources; the rest is data.train"
    )

    @field_validator("sources")
    @classmethod
    def _comparable(cls, sources: list[DataSource]) -> list[DataSource]:
        check_blend(sources)
        return sources


class DataSettings(Section):
    """Which data is read, and how samples are packed into rows of tokens."""

    train: list[DataSource] = Field(
        [], description="training data: a list of sources, for example [{path: a.jsonl, weight: 2.0}], or one path"
    )
    replay: ReplaySettings | None = Field(
        None,
        description="samples of an earlier training stage, mixed in so that the model does not forget it: {sources, "
        "share}; null: none",
    )
    eval: list[EvalSource] = Field(
        [],
        description="held-out data, which score and infer read and eval.every evaluates: one path, or a list of "
        "sources, for example [{path: a.jsonl, name: a}]",
    )
    seq_length: Int = Field(8192, ge=1, description="number of tokens in a row; a row is one micro-batch")
    length_ramp: dict[Steps, Count] = Field(
        {},
        description="only for pretrain and sft: shorter rows at the beginning, each with the last step that has them: "
        "{1000: 4096} means rows of 4096 tokens up to step 1000; then seq_length. Samples are dropped or truncated by "
        "the length of the rows for which they are read",
    )
    packing: Literal["best_fit", "none"] = Field(
        "best_fit",
        description="how samples are packed into rows. best_fit: as many whole samples as fit; none: one sample per "
        "row",
    )
    pad_multiple: Int | None = Field(
        None,
        ge=1,
        description="each sample in a row is padded to a multiple of this number of tokens; null: 2 × "
        "parallel.context, or no padding if parallel.context is 1. Set it to get the same rows with different "
        "parallel.context",
    )
    packing_buffer: Int = Field(
        1000, ge=1, le=10**6, description="number of samples from which best_fit selects the next one for a row"
    )
    max_patches_per_row: Int | None = Field(
        None, ge=4, description="maximum number of vision patches in a row; null: no limit"
    )
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="what happens to samples that are longer than a row. drop: they are skipped and counted; truncate: "
        "their beginning is cut off, where pictures and videos are removed whole",
    )
    append_eos: Bool = Field(
        True,
        description="whether a text record ends with the token that ends a document, <|endoftext|>, which is also "
        "learned; false: nothing is added",
    )
    max_bad_fraction: Float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of broken samples in a source above which the run ends, checked once 100 distinct "
        "samples of it were read, or all that it has; 0: the run ends at the first broken sample",
    )
    max_dropped_fraction: Float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of samples in a source that may be dropped because they are longer than a row or have no "
        "target; if there are more, the run ends, checked as for max_bad_fraction. The default loses a fifth of a "
        "source at most; set it to 1 for data that are meant to be filtered by length",
    )
    shuffle: Bool = Field(
        True, description="whether samples are read in a random order given by train.seed; false: in file order"
    )
    workers: Int = Field(
        2,
        ge=0,
        description="number of processes per data-parallel rank that read and render samples, at most 256; 0: the "
        "training process does it itself",
    )
    media_roots: list[FilePath] | None = Field(
        None,
        min_length=1,
        description="folders in which the local pictures and videos of all samples must be, also after symbolic links "
        "are followed; null: a sample may name any local file",
    )
    media_protocols: list[Str] = Field(
        [],
        description="protocols (https), or single hosts and buckets (http://images.local:8080, s3://bucket), of the "
        "URLs that samples may name in addition to those of their own data file's protocol and host. An http or https "
        "URL that leads to a private address is refused unless its host is listed",
    )
    min_pixels: Int | None = Field(
        None,
        ge=1,
        description="smaller pictures are enlarged to this number of pixels; null: the value of the model's processor",
    )
    max_pixels: Int | None = Field(
        None,
        ge=1,
        description="larger pictures are shrunk to this number of pixels; null: the value of the model's processor",
    )
    max_image_megapixels: Float = Field(
        200.0,
        gt=0,
        description="pictures and video frames of more than this number of million pixels in their files are skipped; "
        "decoding takes 3 bytes of memory per pixel and more",
    )
    video_min_pixels: Int | None = Field(
        None,
        ge=1,
        description="the frames of smaller videos are enlarged until all sampled frames together have this number of "
        "pixels; null: the value of the model's processor",
    )
    video_max_pixels: Int | None = Field(
        None,
        ge=1,
        description="the frames of larger videos are shrunk until all sampled frames together have this number of "
        "pixels; null: the value of the model's processor",
    )
    video_max_pixels_per_frame: Int | None = Field(
        None,
        ge=1,
        description="larger frames of a video are shrunk to this number of pixels, rounded down to whole visual tokens "
        "(cap_pixels_per_frame and max_video_tokens of the processor); null: the values of the model's processor",
    )
    video_fps: Float | None = Field(
        None,
        gt=0,
        description="number of frames per second that are sampled from a video; null: the value of the model's "
        "processor",
    )
    video_max_frames: Int | None = Field(
        None, ge=2, description="maximum number of frames of a video; null: the value of the model's processor"
    )

    @field_validator("workers")
    @classmethod
    def _few_workers(cls, workers: int) -> int:
        if workers > 256:
            raise UserError("it can be at most 256; each is a process with a packing buffer of its own")
        return workers

    @field_validator("media_protocols")
    @classmethod
    def _known_protocols(cls, entries: list[str]) -> list[str]:
        check_media_protocols(entries)
        return entries

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [{"path": value}] if isinstance(value, str | Path) else value

    @field_validator("eval", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("eval")
    @classmethod
    def _distinct(cls, sources: list[EvalSource]) -> list[EvalSource]:
        names = [source.label for source in sources]
        if double := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two sources have the name {quoted(double[0])}", "give one of them another: {path, name}")
        return sources

    @field_validator("train")
    @classmethod
    def _comparable(cls, train: list[DataSource]) -> list[DataSource]:
        check_blend(train)
        return train

    @field_validator("train")
    @classmethod
    def _one_without_end(cls, train: list[DataSource]) -> list[DataSource]:
        if train and all(source.max_tokens is not None for source in leaves_of("", train).values()):
            raise UserError(
                "all sources have max_tokens: nothing would be left to train on when they have given their tokens",
                "remove max_tokens from one of them; train.steps or train.epochs ends the run",
            )
        return train

    @property
    def leaves(self) -> dict[str, DataSource]:
        """All sources that have a path, by the key of that path ("data.train[0].path")."""
        return leaves_of("data.train", self.train) | leaves_of(
            "data.replay.sources", self.replay.sources if self.replay else []
        )

    @property
    def limits(self) -> dict[str, Any]:
        """Those of LIMITS that are not null."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}

    @property
    def skip_limits(self) -> dict[str, float]:
        """The fractions of samples of a source that may be skipped, by the names of the settings."""
        return {
            "data.max_bad_fraction": self.max_bad_fraction,
            "data.max_dropped_fraction": self.max_dropped_fraction,
        }

    @property
    def source_names(self) -> list[str]:
        """The names of the sources in the metrics, in the order of their numbers."""
        return [source.label for source in self.leaves.values()]

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        for prefix in ("", "video_"):
            least, most = getattr(self, f"{prefix}min_pixels"), getattr(self, f"{prefix}max_pixels")
            if least and most and least > most:
                raise UserError(
                    f"data.{prefix}min_pixels is {least}, which is greater than data.{prefix}max_pixels = {most}",
                    f"lower {prefix}min_pixels or raise {prefix}max_pixels",
                )
        lengths = [*dict(sorted(self.length_ramp.items())).values(), self.seq_length]
        if 0 in self.length_ramp or any(a >= b for a, b in pairwise(lengths)):
            raise UserError(
                f"data.length_ramp is {self.length_ramp}, and data.seq_length is {self.seq_length}: the lengths must "
                "grow from entry to entry, and steps count from 1",
                "example: data.length_ramp={1000: 4096} data.seq_length=8192",
            )
        if self.packing == "none" and self.is_changed("packing_buffer"):
            raise UserError(
                f"data.packing_buffer is {self.packing_buffer}, but data.packing is none: it would be ignored",
                "remove packing_buffer, or set data.packing to best_fit",
            )
        return self
