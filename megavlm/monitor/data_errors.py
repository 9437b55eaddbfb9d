"""data_errors.jsonl lists each skipped sample once; a run that has to skip too many samples ends.

A line has ``step`` (the step whose rows lack the sample), ``source`` (the source's name in the metrics), ``sample``
("file:line" or "shard:number"), ``index`` (its number in the source, from 0), ``kind`` ("broken", "too long", "no
target", "too long yet": see ``records/skipped_samples.py``) and ``cause``.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.data.loader import RowLoader
from megavlm.monitor.metrics import append_lines, drop_after, read_lines
from megavlm.monitor.sample_counts import SampleCounts
from megavlm.platform import Groups
from megavlm.platform.collectives import all_gather_objects, broadcast_object
from megavlm.records.skipped_samples import BROKEN, TOO_LONG_YET, SkippedSample, excess, shares

FILE_NAME = "data_errors.jsonl"
_CHECKED_FROM = 100  # samples of a source before its shares are checked; before, one could be too large a share
_TOLD = 3  # skipped samples of each source that are shown on the terminal
_REREAD = 10_000  # skipped samples that are read again when a run continues that ended for its data


class DataErrors:
    """Records the skipped samples of each step. Create it on all ranks; rank 0 writes the file.

    A sample counts once, however often it is skipped. Rank 0 remembers the listed samples with one bit for each sample
    of a source, so a source of a billion samples takes 125 MB at most.

    Args:
        output: the run's folder.
        resume_step: the step from which the run continues. Lines of later steps are removed, because these steps will
            be repeated. If too many samples are listed for the run to go on, those that can be used by now are removed.
        limits: ``DataSettings.skip_limits``.
        samples: how many samples were read; ``take`` updates it.
        loader: reads samples again, on leaders; None if the rows do not come from files.
        groups: the process groups of the run.
        say: shows a message on rank 0.
    """

    def __init__(
        self,
        output: Path,
        resume_step: int,
        limits: Mapping[str, float],
        samples: SampleCounts,
        loader: RowLoader | None,
        groups: Groups,
        say: Callable[[str], None],
    ):
        self.path, self._limits, self._samples, self._loader = output / FILE_NAME, limits, samples, loader
        self._groups, self._say, self._names = groups, say, list(samples.read)
        self._listed: dict[str, bytearray] = {}  # on rank 0, for each source one bit per sample: whether it is listed
        self._told: Counter[str] = Counter()  # skipped samples of each source that were shown on the terminal
        self._counts: Counter[tuple[str, str]] = Counter()  # listed samples by source and kind, equal on all ranks
        self._first: dict[tuple[str, str], str] = {}  # the first listed sample of each source and kind with its cause
        if dist.get_rank() == 0:
            self._resume(resume_step)
        self._share_counts()

    def take(self, step: int, counts: Mapping[str, float], skipped_samples: list[SkippedSample]) -> dict[str, float]:
        """Records the samples of a step. Call it on all ranks.

        Args:
            step: the step, from 1.
            counts: the counts of ``StepResult``, equal on all ranks.
            skipped_samples: those of the rows of this data-parallel rank.

        Returns:
            The fields for metrics.jsonl: ``bad_samples`` and ``dropped_samples`` of the run so far, and ``epoch/NAME``.

        Raises:
            UserError: the disk is full.
        """
        epochs = self._samples.take(counts)
        if counts["skipped_samples"]:
            skipped_samples = self._gathered(skipped_samples)
            if dist.get_rank() == 0:
                self._write(step, skipped_samples)
            self._share_counts()
        broken = sum(count for (_, kind), count in self._counts.items() if kind == BROKEN)
        return {"bad_samples": broken, "dropped_samples": self._counts.total() - broken, **epochs}

    def failure(self) -> UserError | None:
        """The error to raise if a source has too many skipped samples; equal on all ranks.

        A source is checked once 100 distinct samples of it were read, or all that it has. (With a limit of 0, the first
        skipped sample is one too many.)
        """
        for name, read in self._samples.read.items():
            found = excess(self._kinds(name), read, self._limits)
            enough = min(_CHECKED_FROM, self._samples.sizes.get(name, _CHECKED_FROM))
            if found is not None and (read >= enough or found.limit == 0):
                first = next(self._first[name, kind] for kind in found.kinds if (name, kind) in self._first)
                return UserError(
                    f"data source {name}: of {read:,} samples, {found.text}; {self.path} lists them, first {first}",
                    found.remedy,
                )
        return None

    def shares(self) -> list[str]:
        """A sentence for each source about the samples that were skipped in it, if there are any."""
        found = {name: shares(self._kinds(name), read) for name, read in self._samples.read.items()}
        return [f"{name}: of {self._samples.read[name]:,} samples, {text}" for name, text in found.items() if text]

    def _kinds(self, name: str) -> dict[str, int]:
        return {kind: count for (source, kind), count in self._counts.items() if source == name and count}

    def _gathered(self, skipped_samples: list[SkippedSample]) -> list[SkippedSample]:
        """The skipped samples of all data-parallel ranks, on all ranks."""
        mine = skipped_samples if self._groups.is_leader else []
        return [skipped for of_rank in all_gather_objects(mine, self._groups.world_host) for skipped in of_rank]

    def _share_counts(self) -> None:
        """Gives the counts of rank 0 to all ranks."""
        self._counts, self._first = broadcast_object((self._counts, self._first), self._groups.world_host)

    def _count(self, line: dict[str, Any]) -> None:
        """Counts the sample of a line of the file."""
        source, kind = line["source"], line["kind"]
        self._counts[source, kind] += 1
        self._first.setdefault((source, kind), f"{line['sample']}: {line['cause']}")

    def _is_new(self, name: str, index: int) -> bool:
        """Whether a sample was not listed before; from now on it is."""
        bits = self._listed.setdefault(name, bytearray())
        place, bit = index // 8, 1 << index % 8
        bits.extend(bytes(max(0, place + 1 - len(bits))))
        is_new = not bits[place] & bit
        bits[place] |= bit
        return is_new

    def _resume(self, resume_step: int) -> None:
        """Counts the samples that are listed up to a step; see ``__init__``."""
        drop_after(self.path, resume_step)
        lines = [line for line in read_lines(self.path) if self._is_ours(line)]
        for line in lines:
            self._is_new(line["source"], line["index"])
            self._count(line)
        if self._loader is None or self.failure() is None:
            return
        kept = [line for number, line in enumerate(lines) if number >= _REREAD or self._is_still_skipped(line)]
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._say(f"{len(lines) - len(kept):,} of the {len(lines):,} samples in {self.path} can be used by now")
        self._listed, self._counts, self._first = {}, Counter(), {}
        for line in kept:
            self._is_new(line["source"], line["index"])
            self._count(line)

    def _is_ours(self, line: dict[str, Any]) -> bool:
        """Whether this package has written a line of the file, for a source of this run."""
        types = {"source": str, "sample": str, "index": int, "kind": str, "cause": str}
        is_whole = all(isinstance(line.get(name), kind) for name, kind in types.items())
        return is_whole and line["source"] in self._names and line["index"] >= 0

    def _is_still_skipped(self, line: dict[str, Any]) -> bool:
        assert self._loader is not None
        if line["kind"] == TOO_LONG_YET:  # of the steps before, whose rows were shorter
            return True
        beat(f"reading {line['sample']} again")
        return self._loader.reread(self._names.index(line["source"]), line["index"]) is not None

    def _write(self, step: int, skipped_samples: list[SkippedSample]) -> None:
        lines = []
        for skipped in skipped_samples:
            name = self._names[skipped.source_id]
            if not self._is_new(name, skipped.index):  # it was already skipped in an earlier epoch
                continue
            line: dict[str, Any] = {
                "step": step,
                "source": name,
                "sample": skipped.sample,
                "index": skipped.index,
                "kind": skipped.kind,
                "cause": skipped.cause,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            self._count(line)
            self._told[name] += 1
            if self._told[name] <= _TOLD:
                self._say(f"{skipped.kind} sample skipped: {skipped.sample}: {skipped.cause}")
            if self._told[name] == _TOLD + 1:
                self._say(f"further skipped samples of {name} are listed only in {self.path}")
        if lines:
            append_lines(self.path, lines)
