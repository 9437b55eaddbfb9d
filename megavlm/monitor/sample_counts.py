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
        used_up: whether all samples of the last epoch are used, if the run ends with it.
        read: the number of distinct samples of each source that were read.
    """

    def __init__(self, names: list[str], loader: RowLoader | None, groups: Groups):
        mine = None
        if loader is not None:
            mine = ([len(source.file) for source in loader.sources], loader.drawn, loader.ends, loader.epoch)
        found = [counts for counts in all_gather_objects(mine, groups.world_host) if counts is not None]
        self.sizes = dict(zip(names, found[0][0], strict=True)) if found else {}
        self.read, self._used = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        self._ends: list[int] | None = found[0][2] if found else None
        self._epoch: int = found[0][3] if found else 0  # samples that are read in an epoch
        for _, drawn, *_ in found:
            for name, (used, read) in zip(names, drawn, strict=True):
                self._used[name] += used
                self.read[name] += read
        self._before = sum(self._used.values())  # the samples that were used before the last step

    def take(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Counts a step from the counts of ``StepResult``; returns ``epoch/NAME`` for metrics.jsonl."""
        self._before = sum(self._used.values())
        for name in self.read:
            self._used[name] += int(counts[f"used/{name}"])
            self.read[name] += int(counts[f"newly_read/{name}"])
        return {f"epoch/{name}": passes for name, passes in self.epochs.items()}

    @property
    def used_up(self) -> bool:
        if self._ends is None:
            return False
        return all(used >= end for used, end in zip(self._used.values(), self._ends, strict=True))

    def ends_epoch(self, every: int = 1) -> bool:
        """Whether the last step has used the last sample of an epoch whose number is divisible by ``every``."""
        length = self._epoch * every
        return bool(length) and sum(self._used.values()) // length > self._before // length

    @property
    def epochs(self) -> dict[str, float]:
        """The number of passes over each source; a sample that was skipped counts as used."""
        return {name: self._used[name] / size for name, size in self.sizes.items()}
