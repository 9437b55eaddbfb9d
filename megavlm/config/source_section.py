"""The sources of data.train, data.replay and data.eval: files, and blends of them."""

import re

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Count, DataPath, Float, Positive, Section, Str


class DataFile(Section):
    """A data file, or several."""

    path: DataPath | None = Field(
        None,
        description="data file (JSONL, a JSON array, Parquet, Arrow), a pattern that matches several "
        "(shards/*.parquet), or a folder of them or of WebDataset shards (see megavlm data prepare); a path or a URL",
    )
    name: Str | None = Field(None, min_length=1, description="name of the source in metrics; null: the file's name")
    map: dict[Str, Str] = Field(
        {},
        description="for fields of samples that the file calls differently, their names in it: {images: picture, "
        "question: query_text}",
    )
    media: DataPath | None = Field(
        None,
        description="folder from which relative paths of pictures and videos start; null: the folder of the data file",
    )

    @property
    def label(self) -> str:
        """The name in metrics of a source that has a path."""
        if self.name is not None:
            return self.name
        folder, _, file = str(self.path).rstrip("/").rpartition("/")
        for suffix in (".jsonl", ".json", ".parquet", ".arrow", ".feather"):
            file = file.removesuffix(suffix)
        if "*" in file or "?" in file:  # a pattern: what all its files have in common, or their folder
            file = re.split(r"[*?\[]", file)[0].rstrip("-_.") or folder.rpartition("/")[2] or "data"
        return file


class EvalSource(DataFile):
    """A data file, or several, with samples that are not trained on."""

    path: DataPath = Field(description="data file, pattern or folder, as in data.train")


class DataSource(DataFile):
    """A training file, a folder of shards, or a blend of sources, with its share of the blend that contains it."""

    sources: list["DataSource"] = Field([], description="instead of path: a blend of sources, as in data.train")
    weight: Float = Field(
        1.0, gt=0, description="share of the samples that come from this source, relative to the others in the blend"
    )
    epochs: Float | None = Field(
        None,
        gt=0,
        description="instead of weight: number of passes over this source, relative to the others in the blend, which "
        "must have epochs, too",
    )
    loss_weight: Positive = Field(
        1.0, ge=1e-6, description="factor of the weight that its targets have in the loss; only for pretrain and sft"
    )
    max_tokens: Count | None = Field(
        None,
        description="number of tokens of its samples after which the source ends and the others of the blend go on, to "
        "within one sample of each data worker; of methods that sample answers, the prompts count; null: no limit",
    )

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
        if self.sources and (self.map or self.media is not None):
            raise UserError(
                f"a blend has {'map' if self.map else 'media'}, which would be ignored", "give it to the sources in it"
            )
        if self.sources and self.max_tokens is not None:
            raise UserError("a blend has max_tokens, which would be ignored", "give it to the sources in it")
        check_blend(self.sources, epochs_count=self.epochs is not None)
        if self.sources and self.name is not None:
            raise UserError(
                f"the blend {quoted(self.name)} has a name, which would be ignored", "give names to the sources in it"
            )
        if self.epochs is not None and any(source.epochs is None for source in self.sources):
            raise UserError("a blend has epochs, but the sources in it have a weight", "give epochs to the sources")
        return self


def check_blend(sources: list[DataSource], *, epochs_count: bool = False) -> None:
    """Raises UserError unless all sources of a blend have a weight or all have epochs, and these have an effect.

    Args:
        sources: the sources of the blend.
        epochs_count: whether the blend itself has epochs, so that the epochs of a sole source make a difference.
    """
    if len(sources) == 1:
        sole = sources[0]
        no_effect = (
            "epochs"
            if sole.epochs is not None and not epochs_count
            else "weight"
            if sole.is_changed("weight")
            else None
        )
        if no_effect:
            raise UserError(
                f"{quoted(sole.label if sole.path else 'a blend')} is the only source of its blend and has {no_effect} "
                f"{getattr(sole, no_effect):g}, which has no effect: all samples come from it",
                f"remove {no_effect}; how often a source is passed over follows from train.steps",
            )
    by_epochs = [source.epochs is not None for source in sources]
    if any(by_epochs) and not all(by_epochs):
        raise UserError(
            "some sources of a blend have epochs and others have a weight: they cannot be compared",
            "give all of them epochs, or all of them a weight",
        )


def leaves_of(key: str, sources: list[DataSource]) -> dict[str, DataSource]:
    found: dict[str, DataSource] = {}
    for index, source in enumerate(sources):
        inner = leaves_of(f"{key}[{index}].sources", source.sources)
        found |= inner or {f"{key}[{index}].path": source}
    return found
