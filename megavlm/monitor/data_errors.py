"""data_errors.jsonl: the samples that could not be used, each once, and the end of a run that has too many.

A line has ``step`` (in whose rows the sample is missing), ``source`` (its name in the metrics), ``sample``
("file:line", or shard and number), ``kind`` ("broken", "too long", "no target") and ``cause``.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.data.skipped_samples import BROKEN, SkippedSample
from megavlm.monitor.metrics import append_lines, drop_after, read_lines
from megavlm.platform import Groups
from megavlm.platform.collectives import all_gather_objects

FILE_NAME = "data_errors.jsonl"
_CHECKED_FROM = 100  # samples of a source: of fewer, a single one would be too large a share
_TOLD = 3  # on the terminal, of each source


class DataErrors:
    """Records the skipped samples of each step. Made on all ranks; the first one writes.

    Args:
        output: the run's folder. resume_step: lines of later steps are dropped: they will come again.
        names: of the sources, in the order of their numbers.
        max_fraction: ``data.max_bad_fraction``.
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
        self._groups, self._listed, self._first = groups, {}, {}
        self._drawn, self._broken, self._told = Counter(), Counter(), Counter()  # of each source
        if dist.get_rank() == 0:
            drop_after(self.path, resume_step)
            self._listed = {line["sample"]: line["kind"] for line in read_lines(self.path)}

    def take(self, step: int, counts: dict[str, float], skipped_samples: list[SkippedSample]) -> dict[str, int]:
        """Records the skipped samples of a step. Call it on all ranks.

        Args:
            counts: of ``StepResult``, the same on all ranks.
            skipped_samples: of this data rank's rows.

        Returns:
            on rank 0 the fields for metrics.jsonl: ``bad_samples`` and ``dropped_samples``, found so far in this run.

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
        kinds = Counter(self._listed.values())
        return {"bad_samples": kinds[BROKEN], "dropped_samples": kinds.total() - kinds[BROKEN]}

    def failure(self) -> UserError | None:
        """What to raise where a source has more broken samples than ``data.max_bad_fraction``; on all ranks or none."""
        for name, drawn in self._drawn.items():
            broken = self._broken[name]
            enough = drawn >= _CHECKED_FROM or self._max_fraction == 0
            if enough and broken > self._max_fraction * drawn:
                first = self._first[name]
                return UserError(
                    f"data source {name}: {broken} of {drawn} samples are broken, more than data.max_bad_fraction = "
                    f"{self._max_fraction:g}; each is named in {self.path}, the first is {first.sample}: {first.cause}",
                    "mend or remove them, or raise data.max_bad_fraction; the same command continues",
                )
        return None

    def _gathered(self, skipped_samples: list[SkippedSample]) -> list[SkippedSample]:
        """All data ranks' skipped samples, on all ranks."""
        mine = skipped_samples if self._groups.is_leader else []
        return [skipped for of_rank in all_gather_objects(mine, self._groups.world_host) for skipped in of_rank]

    def _write(self, step: int, skipped_samples: list[SkippedSample]) -> None:
        lines = []
        for skipped in skipped_samples:
            if skipped.sample in self._listed:  # it came in an earlier epoch
                continue
            self._listed[skipped.sample] = skipped.kind
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
                self._say(f"{skipped.kind} sample left out: {skipped.sample}: {skipped.cause}")
            if self._told[name] == _TOLD:
                self._say(f"more such samples of {name} are named in {self.path} alone")
        if lines:
            append_lines(self.path, lines)
