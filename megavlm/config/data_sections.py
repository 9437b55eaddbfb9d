"""The data section: which files are read, how they are blended, and how their samples become rows of tokens."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, DataPath, Float, Int, Section, Str


class DataSource(Section):
    """One training file or shard folder, or a blend of some, and its share of the blend that it stands in."""

    path: DataPath | None = Field(
        None, description="JSONL file, one sample a line, or folder of shards (megavlm data prepare); a path or a URL"
    )
    sources: list["DataSource"] = Field([], description="instead of path: a blend of sources, as in data.train")
    name: Str | None = Field(None, min_length=1, description="what metrics call it; null: the file's name")
    weight: Float = Field(1.0, gt=0, description="share of the samples drawn, relative to its neighbours")
    epochs: Float | None = Field(
        None, gt=0, description="instead of weight: how often its samples come while its neighbours' come as often"
    )

    @property
    def label(self) -> str:
        """What metrics call a source that has a path."""
        return self.name or str(self.path).rstrip("/").rpartition("/")[2].removesuffix(".jsonl")

    @model_validator(mode="after")
    def _consistent(self) -> "DataSource":
        if (self.path is None) == (not self.sources):
            found = "both path and sources" if self.sources else "neither path nor sources"
            raise UserError(f"a source of data.train has {found}", "give it a path, or sources to blend")
        if self.epochs is not None and self.is_changed("weight"):
            raise UserError(
                f"a source of data.train has weight {self.weight:g} and epochs {self.epochs:g}: one would be ignored",
                "remove one of them",
            )
        check_blend(self.sources)
        if self.sources and self.name is not None:
            raise UserError(f"the blend {self.name!r} has a name, which would be ignored", "name the sources in it")
        if self.epochs is not None and any(source.epochs is None for source in self.sources):
            raise UserError("a blend is given by epochs, but the sources in it by weight", "give them epochs")
        return self


def check_blend(sources: list[DataSource]) -> None:
    """Raises UserError unless all sources of a blend are given by weight, or all by epochs."""
    by_epochs = [source.epochs is not None for source in sources]
    if any(by_epochs) and not all(by_epochs):
        raise UserError(
            "some sources of a blend have epochs, others a weight: they cannot be compared",
            "give all of them epochs, or all of them a weight",
        )


def _leaves(key: str, sources: list[DataSource]) -> dict[str, DataSource]:
    found = {}
    for index, source in enumerate(sources):
        inner = _leaves(f"{key}[{index}].sources", source.sources)
        found |= inner or {f"{key}[{index}].path": source}
    return found


class ReplaySettings(Section):
    """Samples of earlier training, mixed in so that it is not forgotten."""

    sources: list[DataSource] = Field(min_length=1, description="as in data.train")
    share: Float = Field(0.3, gt=0, lt=1, description="share of all samples; the rest is data.train")

    @field_validator("sources")
    @classmethod
    def _comparable(cls, sources: list[DataSource]) -> list[DataSource]:
        check_blend(sources)
        return sources


class DataSettings(Section):
    """What is read, and how samples become rows of tokens."""

    train: list[DataSource] = Field([], description="training sources: [{path, weight}], or one path")
    replay: ReplaySettings | None = Field(
        None, description="{sources, share}: samples of earlier training, mixed in so that it is not forgotten"
    )
    eval: DataPath | None = Field(None, description="JSONL file, or folder of shards, that score and infer read")
    seq_length: Int = Field(8192, ge=1, description="tokens in a row; a row is one micro-batch")
    packing: Literal["best_fit", "none"] = Field(
        "best_fit", description="best_fit: whole samples side by side in a row; none: one sample a row"
    )
    pad_multiple: Int | None = Field(
        None,
        ge=1,
        description="samples are padded in their row to a multiple of this many tokens; null: 2 × parallel.context, or "
        "none without it. Set it to have the same rows in layouts of different context",
    )
    packing_buffer: Int = Field(1000, ge=1, description="samples among which best_fit looks for one that fits")
    max_patches_per_row: Int | None = Field(
        None, ge=4, description="most patches in a row, so that no row is all pictures; null: as many as come"
    )
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="samples longer than a row. drop: left out and counted; truncate: their beginning is cut away, "
        "pictures and videos only as a whole",
    )
    max_bad_fraction: Float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of broken samples of a source above which the run stops (from 100 samples on; 0: at the "
        "first)",
    )
    shuffle: Bool = Field(True, description="visit samples in an order drawn from train.seed; false: file order")
    workers: Int = Field(2, ge=0, description="processes that read and render samples; 0: the training process does")
    min_pixels: Int | None = Field(None, ge=1, description="smaller pictures are enlarged to it; null: as in model.hf")
    max_pixels: Int | None = Field(None, ge=1, description="larger pictures are shrunk to it; null: as in model.hf")
    video_fps: Float | None = Field(None, gt=0, description="frames sampled per second; null: as in model.hf")
    video_max_frames: Int | None = Field(None, ge=2, description="most frames of a video; null: as in model.hf")

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
        """All sources that have a path, by the key where that stands ("data.train[0].path")."""
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
                f"data.min_pixels is {self.min_pixels}, more than data.max_pixels, {self.max_pixels}",
                "lower min_pixels or raise max_pixels",
            )
        if self.packing == "none" and self.is_changed("packing_buffer"):
            raise UserError(
                f"data.packing_buffer is {self.packing_buffer}, but data.packing none keeps no buffer",
                "remove packing_buffer or use data.packing best_fit",
            )
        return self
