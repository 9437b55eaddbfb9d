"""data_errors.jsonl lists each skipped sample once; a run with too many broken samples ends.

A line has ``step`` (the step whose rows lack the sample), ``source`` (the source's name in the metrics), ``sample``
("file:line" or "shard:number"), ``kind`` ("broken", "too long", "no target") and ``cause``.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.monitor.metrics import append_lines, drop_after, read_lines
from megavlm.platform import Groups
from megavlm.platform.collectives import all_gather_objects
from megavlm.records.skipped_samples import BROKEN, SkippedSample

FILE_NAME = "data_errors.jsonl"
_CHECKED_FROM = 100  # samples of a source before its broken share is checked; before, one could be too large a share
_TOLD = 3  # skipped samples of each source that are shown on the terminal


class DataErrors:
    """Records the skipped samples of each step. Create it on all ranks; rank 0 writes the file.

    Args:
        output: the run's folder.
        resume_step: the step from which the run continues. Lines of later steps are removed, because these steps will
            be repeated.
        names: the names of the sources, in the order of their numbers.
        max_fraction: ``data.max_bad_fraction``.
        groups: the process groups of the run.
        say: shows a message on rank 0.
    """

    def __init__(
        self,
        output: Path,
        resume_step: int,
        names: list[str],
        max_fraction: float,
        groups: Groups,
        say: Callable[[str], None],
    ):
        self.path, self._names, self._max_fraction, self._say = output / FILE_NAME, names, max_fraction, say
        self._groups = groups
        self._listed: set[str] = set()  # the samples in the file
        self._kinds: Counter[str] = Counter()  # numbers of samples of each kind in the file
        self._first: dict[str, SkippedSample] = {}  # the first broken sample of each source
        # numbers of samples of each source: all, broken ones, and skipped ones that were shown on the terminal
        self._drawn: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        if dist.get_rank() == 0:
            drop_after(self.path, resume_step)
            for line in read_lines(self.path):
                sample, kind = line.get("sample"), line.get("kind")
                if isinstance(sample, str) and isinstance(kind, str):
                    self._list(sample, kind)

    def take(self, step: int, counts: Mapping[str, float], skipped_samples: list[SkippedSample]) -> dict[str, int]:
        """Records the skipped samples of a step. Call it on all ranks.

        Args:
            step: the step, from 1.
            counts: the counts of ``StepResult``, equal on all ranks.
            skipped_samples: those of the rows of this data-parallel rank.

        Returns:
            The fields for metrics.jsonl, valid on rank 0: ``bad_samples`` and ``dropped_samples`` of the run so far.

        Raises:
            UserError: the disk is full.
        """
        if counts["skipped_samples"]:
            skipped_samples = self._gathered(skipped_samples)
            for skipped in skipped_samples:
                if skipped.kind == BROKEN:
                    self._first.setdefault(self._names[skipped.source_id], skipped)
            if dist.get_rank() == 0:
                self._write(step, skipped_samples)
        for name in self._names:
            self._drawn[name] += int(counts[f"records/{name}"] + counts[f"broken/{name}"])
            self._broken[name] += int(counts[f"broken/{name}"])
        broken = self._kinds[BROKEN]
        return {"bad_samples": broken, "dropped_samples": self._kinds.total() - broken}

    def failure(self) -> UserError | None:
        """The error to raise if the broken share of a source exceeds ``data.max_bad_fraction``; equal on all ranks."""
        for name, drawn in self._drawn.items():
            broken = self._broken[name]
            enough = drawn >= _CHECKED_FROM or self._max_fraction == 0
            if enough and broken > self._max_fraction * drawn:
                first = self._first[name]
                return UserError(
                    f"data source {name}: {broken} of {drawn} samples are broken, more than data.max_bad_fraction = "
                    f"{self._max_fraction:g}; {self.path} lists them, the first is {first.sample}: {first.cause}",
                    "repair or remove them, or raise data.max_bad_fraction; the same command then continues the run",
                )
        return None

    def _gathered(self, skipped_samples: list[SkippedSample]) -> list[SkippedSample]:
        """The skipped samples of all data-parallel ranks, on all ranks."""
        mine = skipped_samples if self._groups.is_leader else []
        return [skipped for of_rank in all_gather_objects(mine, self._groups.world_host) for skipped in of_rank]

    def _list(self, sample: str, kind: str) -> bool:
        """Counts a sample, unless it was counted already. Returns whether it is new."""
        is_new = sample not in self._listed
        if is_new:
            self._listed.add(sample)
            self._kinds[kind] += 1
        return is_new

    def _write(self, step: int, skipped_samples: list[SkippedSample]) -> None:
        lines = []
        for skipped in skipped_samples:
            if not self._list(skipped.sample, skipped.kind):  # it was already skipped in an earlier epoch
                continue
            name = self._names[skipped.source_id]
            line = {
                "step": step,
                "source": name,
                "sample": skipped.sample,
                "kind": skipped.kind,
                "cause": skipped.cause,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            self._told[name] += 1
            if self._told[name] <= _TOLD:
                self._say(f"{skipped.kind} sample skipped: {skipped.sample}: {skipped.cause}")
            if self._told[name] == _TOLD:
                self._say(f"further skipped samples of {name} are listed only in {self.path}")
        if lines:
            append_lines(self.path, lines)
