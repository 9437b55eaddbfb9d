"""How far a run has come in each of its sources: distinct samples that were read, and passes over the source."""

from collections.abc import Mapping

from megavlm.data.loader import RowLoader
from megavlm.platform import Groups
from megavlm.platform.collectives import all_gather_objects


class SampleCounts:
    """Counts of each source, equal on all ranks. Create it on all ranks; a run that continues goes on counting.

    Only numbers are kept, however large the sources are: an epoch contains each sample once, so the samples of the
    first epoch are distinct (see ``SampleOrder.drawn``). The counts of earlier starts follow from the loader's state.

    Args:
        names: the names of the sources, in the order of their numbers.
        loader: the loader of this rank, in the state from which the run continues; None if it reads no rows.
        groups: the process groups of the run.

    Attributes:
        sizes: the number of samples in each source; {} if the rows do not come from files.
        read: the number of distinct samples of each source that were read.
    """

    def __init__(self, names: list[str], loader: RowLoader | None, groups: Groups):
        mine = None if loader is None else ([len(source.file) for source in loader.sources], loader.drawn)
        found = [counts for counts in all_gather_objects(mine, groups.world_host) if counts is not None]
        self.sizes = dict(zip(names, found[0][0], strict=True)) if found else {}
        self.read, self._used = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for _, drawn in found:
            for name, (used, read) in zip(names, drawn, strict=True):
                self._used[name] += used
                self.read[name] += read

    def take(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Counts a step from the counts of ``StepResult``; returns ``epoch/NAME`` for metrics.jsonl."""
        for name in self.read:
            self._used[name] += int(counts[f"used/{name}"])
            self.read[name] += int(counts[f"newly_read/{name}"])
        return {f"epoch/{name}": passes for name, passes in self.epochs.items()}

    @property
    def epochs(self) -> dict[str, float]:
        """The number of passes over each source; a sample that was skipped counts as used."""
        return {name: self._used[name] / size for name, size in self.sizes.items()}
