"""The data section: the files to read, the blend of sources, and the packing of samples into rows of tokens."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, DataPath, Float, Int, Section, Str


class DataSource(Section):
    """A training file, a folder of shards, or a blend of sources, with its share of the blend that contains it."""

    path: DataPath | None = Field(
        None,
        description="JSONL file with one sample per line, or folder of shards (see megavlm data prepare); a path or a "
        "URL",
    )
    sources: list["DataSource"] = Field([], description="instead of path: a blend of sources, as in data.train")
    name: Str | None = Field(None, min_length=1, description="name of the source in metrics; null: the file's name")
    weight: Float = Field(
        1.0, gt=0, description="share of the samples that come from this source, relative to the others in the blend"
    )
    epochs: Float | None = Field(
        None,
        gt=0,
        description="instead of weight: number of passes over this source, relative to the others in the blend, which "
        "must have epochs, too",
    )

    @property
    def label(self) -> str:
        """The name in metrics of a source that has a path."""
        return self.name or str(self.path).rstrip("/").rpartition("/")[2].removesuffix(".jsonl")

    @model_validator(mode="after")
    def _consistent(self) -> "DataSource":
        if (self.path is None) == (not self.sources):
            found = "both path and sources" if self.sources else "neither path nor sources"
            raise UserError(f"a source of data.train has {found}", "give it a path, or sources to blend")
        if self.epochs is not None and self.is_changed("weight"):
            raise UserError(
                f"a source of data.train has both weight {self.weight:g} and epochs {self.epochs:g}: one would be "
                "ignored",
                "remove one of them",
            )
        check_blend(self.sources)
        if self.sources and self.name is not None:
            raise UserError(
                f"the blend {self.name!r} has a name, which would be ignored", "give names to the sources in it"
            )
        if self.epochs is not None and any(source.epochs is None for source in self.sources):
            raise UserError("a blend has epochs, but the sources in it have a weight", "give epochs to the sources")
        return self


def check_blend(sources: list[DataSource]) -> None:
    """Raises UserError unless all sources of a blend have a weight or all have epochs."""
    by_epochs = [source.epochs is not None for source in sources]
    if any(by_epochs) and not all(by_epochs):
        raise UserError(
            "some sources of a blend have epochs and others have a weight: they cannot be compared",
            "give all of them epochs, or all of them a weight",
        )


def _leaves(key: str, sources: list[DataSource]) -> dict[str, DataSource]:
    found: dict[str, DataSource] = {}
    for index, source in enumerate(sources):
        inner = _leaves(f"{key}[{index}].sources", source.sources)
        found |= inner or {f"{key}[{index}].path": source}
    return found


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
    eval: DataPath | None = Field(None, description="JSONL file or folder of shards that score and infer read")
    seq_length: Int = Field(8192, ge=1, description="number of tokens in a row; a row is one micro-batch")
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
        1000, ge=1, description="number of samples from which best_fit selects the next one for a row"
    )
    max_patches_per_row: Int | None = Field(
        None, ge=4, description="maximum number of vision patches in a row; null: no limit"
    )
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="what happens to samples that are longer than a row. drop: they are skipped and counted; truncate: "
        "their beginning is cut off, where pictures and videos are removed whole",
    )
    max_bad_fraction: Float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of broken samples in a source above which the run ends, checked once 100 samples of it "
        "were read; 0: the run ends at the first broken sample",
    )
    shuffle: Bool = Field(
        True, description="whether samples are read in a random order given by train.seed; false: in file order"
    )
    workers: Int = Field(
        2,
        ge=0,
        description="number of processes per data-parallel rank that read and render samples; 0: the training process "
        "does it itself",
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
    video_fps: Float | None = Field(
        None,
        gt=0,
        description="number of frames per second that are sampled from a video; null: the value of the model's "
        "processor",
    )
    video_max_frames: Int | None = Field(
        None, ge=2, description="maximum number of frames of a video; null: the value of the model's processor"
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [{"path": value}] if isinstance(value, str | Path) else value

    @field_validator("train")
    @classmethod
    def _comparable(cls, train: list[DataSource]) -> list[DataSource]:
        check_blend(train)
        return train

    @property
    def leaves(self) -> dict[str, DataSource]:
        """All sources that have a path, by the key of that path ("data.train[0].path")."""
        return _leaves("data.train", self.train) | _leaves(
            "data.replay.sources", self.replay.sources if self.replay else []
        )

    @property
    def source_names(self) -> list[str]:
        """The names of the sources in the metrics, in the order of their numbers."""
        return [source.label for source in self.leaves.values()]

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(
                f"data.min_pixels is {self.min_pixels}, which is greater than data.max_pixels = {self.max_pixels}",
                "lower min_pixels or raise max_pixels",
            )
        if self.packing == "none" and self.is_changed("packing_buffer"):
            raise UserError(
                f"data.packing_buffer is {self.packing_buffer}, but data.packing is none: it would be ignored",
                "remove packing_buffer, or set data.packing to best_fit",
            )
        return self
