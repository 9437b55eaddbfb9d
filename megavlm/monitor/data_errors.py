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
from megavlm.data.faults import BROKEN, Fault
from megavlm.monitor.metrics import append_lines, drop_after, read_lines
from megavlm.platform import Groups

FILE_NAME = "data_errors.jsonl"
_CHECKED_FROM = 100  # samples of a source: of fewer, a single one would be too large a share
_TOLD = 3  # on the terminal, of each source


class DataErrors:
    """Takes down the faults of each step. Made on all ranks; the first one writes.

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

    def take(self, step: int, counts: dict[str, float], faults: list[Fault]) -> dict[str, int]:
        """Takes down the faults of a step. Call it on all ranks.

        Args:
            counts: of ``StepResult``, the same on all ranks.
            faults: of this data rank's rows.

        Returns:
            on rank 0 the fields for metrics.jsonl: ``bad_samples`` and ``dropped_samples``, found so far in this run.

        Raises:
            UserError: the disk is full.
        """
        if counts["faults"]:
            faults = self._gathered(faults)
            for fault in faults:
                if fault.kind == BROKEN:
                    self._first.setdefault(self._names[fault.source_id], fault)
            if dist.get_rank() == 0:
                self._write(step, faults)
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

    def _gathered(self, faults: list[Fault]) -> list[Fault]:
        """All data ranks' faults, on all ranks."""
        boxes = [None] * dist.get_world_size()
        dist.all_gather_object(boxes, faults if self._groups.is_leader else [], group=self._groups.world_host)
        return [fault for box in boxes for fault in box]

    def _write(self, step: int, faults: list[Fault]) -> None:
        lines = []
        for fault in faults:
            if fault.sample in self._listed:  # it came in an earlier epoch
                continue
            self._listed[fault.sample] = fault.kind
            name = self._names[fault.source_id]
            line = {"step": step, "source": name, "sample": fault.sample, "kind": fault.kind, "cause": fault.cause}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            self._told[name] += 1
            if self._told[name] <= _TOLD:
                self._say(f"{fault.kind} sample left out: {fault.sample}: {fault.cause}")
            if self._told[name] == _TOLD:
                self._say(f"more such samples of {name} are named in {self.path} alone")
        if lines:
            append_lines(self.path, lines)
