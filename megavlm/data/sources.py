"""The sources of a run: any file or folder of samples, and the share that each has in the blend."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSettings
from megavlm.data.files import is_folder
from megavlm.data.jsonl import JsonlFile
from megavlm.data.media import Find
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample
from megavlm.data.shards import ShardFolder


class SampleFile(Protocol):
    """Random access to samples, whatever form they lie in. Copies go to worker processes."""

    path: str

    def __len__(self) -> int: ...

    def source(self, index: int) -> str:
        """Where sample `index` lies, for messages; raises nothing."""

    def read(self, index: int) -> tuple[Any, Find]:
        """The parsed record of sample `index`, and where its media are found. Raises UserError."""


@dataclass
class Source:
    """A source of the blend: ``share`` of all samples, 0 to 1."""

    name: str
    file: SampleFile
    share: float


def open_file(path: str | Path) -> SampleFile:
    """JSONL, or a folder of shards. Raises UserError if it is neither."""
    try:
        folder = not str(path).endswith(".jsonl") and is_folder(path)
    except Exception as error:  # fsspec has as many exceptions as protocols
        raise UserError(f"{path} cannot be read: {error}") from None
    return ShardFolder(path) if folder else JsonlFile(path)


def open_sources(settings: DataSettings) -> list[Source]:
    """The training sources of the ``data`` section, opened, with nested blends and the replay source worked out.

    Raises:
        UserError: no sources, or one that is missing or empty.
    """
    if not settings.train:
        raise UserError("data.train names no data", "name a file: data.train: [{path: …}]")
    sources = _opened(settings.train)[0]
    if settings.replay:
        share = settings.replay.share
        sources = [replace(source, share=source.share * (1 - share)) for source in sources]
        sources += [replace(s, share=s.share * share) for s in _opened(settings.replay.sources)[0]]
    for source in sources:
        if sum(other.name == source.name for other in sources) > 1:
            raise UserError(
                f"two sources of data.train are called {source.name!r}: their metrics could not be told apart",
                "give one of them a name: {path: …, name: …}",
            )
    return sources


def _opened(blend: list) -> tuple[list[Source], float]:
    """The leaves of a blend, their shares of it, and the sum of its weights (samples, where it is by epochs)."""
    parts = []
    for item in blend:
        if item.sources:
            leaves, samples = _opened(item.sources)
        else:
            leaves = [Source(item.label, open_file(item.path), 1.0)]
            samples = len(leaves[0].file)
        parts.append((leaves, item.weight if item.epochs is None else item.epochs * samples))
    total = sum(weight for _, weight in parts)
    return [replace(leaf, share=leaf.share * weight / total) for leaves, weight in parts for leaf in leaves], total


def read_samples(
    path: str | Path, renderer: Renderer, kind: Kind, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[Sample]:
    """The samples of a file in its order, rendered one by one; of each `num_ranks`, the `rank`-th.

    Raises UserError, naming file and line, at the first sample that cannot be used.
    """
    file = open_file(path)
    for index in range(rank, len(file), num_ranks):
        record, find = file.read(index)
        yield renderer.encode(record, find, file.source(index), kind=kind, index=index)
