"""The results of `score` and `infer`: written as they come, continued after an interruption, complete when published.

``answers.jsonl`` and ``scores.jsonl`` appear when all samples have been read. Until then the results are in
``NAME.jsonl.partial``, whose first line says what they are made from. Beside the published file, ``NAME.json`` has this
note, and ``NAME_errors.jsonl`` lists the samples that could not be used, if there are any.
"""

import glob
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.number_format import counted
from megavlm.monitor.metrics import append_lines
from megavlm.platform.collectives import gather_objects, on_first_rank
from megavlm.records.skipped_samples import SkippedSample
from megavlm.runtime.session import Session

_TOLD = 3  # samples that could not be used and are shown on the terminal


class Results:
    """Takes the results of all ranks; rank 0 writes them. Create it on all ranks.

    Args:
        session: the session of the command.
        path: the file to publish.
        note: what the results are made from, in values of JSON: written to ``NAME.json``.
        identity: called on rank 0; returns what must be equal for an interrupted start to be continued, likewise.

    Attributes:
        done: the numbers of the samples for which an interrupted start has results, or which it could not use.

    Raises:
        UserError: an interrupted start used something else, and ``overwrite`` is false; the disk is full.
    """

    def __init__(self, session: Session, path: Path, note: dict[str, Any], identity: Callable[[], dict[str, Any]]):
        self.path, self._note, self._session = path, note, session
        self._partial = path.with_name(f"{path.name}.partial")
        self._own = self._partial.with_name(f"{self._partial.name}-{dist.get_rank()}")
        self._kept: list[dict[str, Any]] = []  # what this rank has, and rank 0 has not
        self._errors = path.with_name(f"{path.stem}_errors.jsonl")
        self._lines: list[dict[str, Any]] = []  # on rank 0
        self._told = 0
        host = session.groups.world_host
        self.done: set[int] = on_first_rank(lambda: self._open(json.loads(json.dumps(identity()))), host)

    def take(self, found: list[dict[str, Any]], skipped: Sequence[SkippedSample]) -> None:
        """Writes the results of all ranks. Call it on all ranks, those without results pass empty lists.

        Args:
            found: each with ``index``; the two answers of a pair also with ``side``.
            skipped: samples that could not be used.
        """
        mine, self._kept = self._kept + _lines(found, skipped), []
        self._write([line for lines in gather_objects(mine, self._session.groups.world_host) for line in lines])

    def keep(self, found: list[dict[str, Any]], skipped: Sequence[SkippedSample]) -> None:
        """Writes the results of this rank, whatever the others do; ``take`` must follow when all are done.

        Rank 0 writes them to the file of all ranks. Every other rank writes to one of its own, ``NAME.partial-RANK``,
        which is read after an interruption and otherwise not needed.

        Args:
            found, skipped: as for ``take``.
        """
        lines = _lines(found, skipped)
        if self._session.is_first:
            self._write(lines)
        elif lines:
            append_lines(self._own, [json.dumps(line, ensure_ascii=False) + "\n" for line in lines])
            self._kept += lines

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if lines:
            self._tell(lines)
            append_lines(self._partial, [json.dumps(line, ensure_ascii=False) + "\n" for line in lines])
            self._lines += lines

    def publish(self, what: str) -> tuple[list[dict[str, Any]], str]:
        """Publishes the file when all samples have been read. Call it on all ranks.

        Args:
            what: what was read, for the message that nothing in it can be used.

        Returns:
            On rank 0 the lines in the order of the samples, and a sentence about samples that could not be used, or "";
            elsewhere ([], "").

        Raises:
            UserError: no sample can be used.
        """
        on_first_rank(lambda: self._publish(what), self._session.groups.world_host)
        if not self._session.is_first:
            return [], ""
        usable, bad = self._sorted()
        return usable, f"{_counted(bad)}, listed in {self._errors}" if bad else ""

    def _open(self, identity: dict[str, Any]) -> set[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read()
        if kept:
            before = kept.pop(0)
            changed = {key: (before.get(key), now) for key, now in identity.items() if before.get(key) != now}
            if not changed:
                self._lines = self._whole(kept)
                print(f"continuing {self._partial}: {len(kept)} samples are done", flush=True)
            elif not self._session.settings.overwrite:
                listed = "".join(f"\n  {key}: {old} there, {now} now" for key, (old, now) in changed.items())
                raise UserError(
                    f"{self._partial} was begun with something else:{listed}",
                    f"continue with the same, choose another output, or delete {self._partial}",
                )
        begin = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (identity, *self._lines))
        write_text(self._partial, begin)
        for file in self._of_other_ranks():
            file.unlink()
        return {line["index"] for line in self._lines}

    def _whole(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines without those of pairs of which one answer is missing: both are read again."""
        sides = Counter(line["index"] for line in lines if "side" in line)
        return [line for line in lines if sides.get(line["index"], 2) == 2]

    def _read(self) -> list[dict[str, Any]]:
        """The lines of an interrupted start, without one that it had not written completely."""
        lines: list[dict[str, Any]] = []
        if not self._partial.is_file():
            return lines
        for file in [self._partial, *self._of_other_ranks()]:
            for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    line = parse_json(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and ("index" in line or not lines):
                    lines.append(line)
        return lines

    def _of_other_ranks(self) -> list[Path]:
        return sorted(self._partial.parent.glob(f"{glob.escape(self._partial.name)}-*"))

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        for line in (line for line in lines if "cause" in line):
            self._told += 1
            if self._told <= _TOLD:
                print(f"{line['kind']} sample skipped: {line['sample']}: {line['cause']}", flush=True)
            if self._told == _TOLD + 1:
                print(f"further skipped samples are listed only in {self._errors}", flush=True)

    def _sorted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        lines = sorted(self._lines, key=lambda line: (line["index"], line.get("side") == "rejected"))
        return [line for line in lines if "cause" not in line], [line for line in lines if "cause" in line]

    def _publish(self, what: str) -> None:
        usable, bad = self._sorted()
        text = lambda lines: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._errors.unlink(missing_ok=True)
        if bad:
            write_text(self._errors, text(bad))
        if not usable:
            self._partial.unlink()
            raise UserError(
                f"no sample of {what} can be used ({_counted(bad)}, listed in {self._errors}); the first is "
                f"{bad[0]['sample']}: {bad[0]['cause']}",
                f"{bad[0].get('remedy') or 'repair the file'}; or give another file as data.eval",
            )
        self.path.unlink(missing_ok=True)  # the note must never stand beside the results of others
        write_text(self.path.with_suffix(".json"), json.dumps(self._note, ensure_ascii=False, indent=1) + "\n")
        write_text(self.path, text(usable))
        for file in [self._partial, *self._of_other_ranks()]:
            file.unlink()


def _lines(found: list[dict[str, Any]], skipped: Sequence[SkippedSample]) -> list[dict[str, Any]]:
    bad = [
        {"index": s.index, "sample": s.sample, "kind": s.kind, "cause": s.cause, "remedy": s.remedy} for s in skipped
    ]
    return [*found, *({name: value for name, value in line.items() if value is not None} for line in bad)]


def _counted(bad: list[dict[str, Any]]) -> str:
    """ "3 samples skipped: 2 broken, 1 too long"."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(line["kind"] for line in bad).most_common())
    return f"{counted(len(bad), 'sample')} skipped: {kinds}"
