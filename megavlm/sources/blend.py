"""The data sources of a run: files and folders of samples, and the share of each in the blend."""

from collections import Counter
from dataclasses import dataclass, replace

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSettings
from megavlm.config.source_section import DataFile
from megavlm.media.access import MediaAccess
from megavlm.sources.open_files import SampleFile as SampleFile  # where a source is wanted, its file is, too
from megavlm.sources.open_files import open_file as open_file


@dataclass
class Source:
    """A source of the blend.

    Attributes:
        share: its share of all samples, from 0 to 1.
        loss_weight: factor of the weight of its targets.
        passes: how often it is read while the blend is read once: its ``epochs``; 1 if the blend has weights.
        max_tokens: number of tokens after which it ends; None: no limit.
        is_replay: whether it belongs to ``data.replay``, which is mixed in.
    """

    name: str
    file: SampleFile
    share: float
    loss_weight: float = 1.0
    passes: float = 1.0
    max_tokens: int | None = None
    is_replay: bool = False


def media_access(settings: DataSettings) -> MediaAccess:
    """Which media records may name, from data.media_roots and data.media_protocols."""
    roots = settings.media_roots
    return MediaAccess(None if roots is None else tuple(map(str, roots)), tuple(settings.media_protocols))


def _file(source: DataFile, access: MediaAccess) -> SampleFile:
    assert source.path is not None, "a source has a path or sources"
    return open_file(source.path, access, source.map, None if source.media is None else str(source.media))


def open_eval_sources(settings: DataSettings) -> list[Source]:
    """Opens the sources of ``data.eval``. Raises UserError if one is missing or empty."""
    access = media_access(settings)
    return [Source(source.label, _file(source, access), 1.0) for source in settings.eval]


def open_sources(settings: DataSettings) -> list[Source]:
    """Open the training sources of the ``data`` section and compute their shares over nested blends and replay.

    Raises:
        UserError: there are no sources, or a source is missing or empty.
    """
    if not settings.train:
        raise UserError("data.train is empty", "list at least one file: data.train: [{path: …}]")
    access = media_access(settings)
    sources = _opened(settings.train, access)[0]
    if settings.replay:
        share = settings.replay.share
        sources = [replace(source, share=source.share * (1 - share)) for source in sources]
        replayed = _opened(settings.replay.sources, access)[0]
        sources += [replace(s, share=s.share * share, is_replay=True) for s in replayed]
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise UserError(
                f"two sources of data.train have the name {name!r}, so their metrics could not be distinguished",
                "give one of them another name: {path: …, name: …}",
            )
    return sources


def _opened(blend: list, access: MediaAccess) -> tuple[list[Source], float]:
    """The leaf sources of a blend with their shares of it, and the sum of its weights (samples if it uses epochs)."""
    parts = []
    for item in blend:
        if item.sources:
            leaves, samples = _opened(item.sources, access)
        else:
            leaves = [Source(item.label, _file(item, access), 1.0, max_tokens=item.max_tokens)]
            samples = len(leaves[0].file)
        leaves = [
            replace(leaf, loss_weight=leaf.loss_weight * item.loss_weight, passes=leaf.passes * (item.epochs or 1.0))
            for leaf in leaves
        ]
        parts.append((leaves, item.weight if item.epochs is None else item.epochs * samples))
    total = sum(weight for _, weight in parts)
    return [replace(leaf, share=leaf.share * weight / total) for leaves, weight in parts for leaf in leaves], total


def samples_of_epochs(sources: list[Source], epochs: float) -> list[int]:
    """How many samples of each source are read in so many passes over the training data."""
    trained = [source for source in sources if not source.is_replay]
    whole = sum(source.passes * len(source.file) for source in trained) / sum(source.share for source in trained)
    return [max(round(epochs * whole * source.share), 1) for source in sources]


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` evenly spaced numbers from 0 to `count` - 1: the middles of as many intervals of equal length."""
    chosen = min(count, most)
    return [(2 * place + 1) * count // (2 * chosen) for place in range(chosen)]
