"""Samples that kill the process that reads them: they are listed in the output folder and passed over from then on."""

import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.sources.blend import Source
from megavlm.workers.current_sample import PIXELS, RECORD, Notes, Reading

FOLDER = "fatal_samples"  # within the output folder
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
"""Signals that do not come from what the process itself did."""
_PARTS = {"record": RECORD, "pixels": PIXELS}
_log = logging.getLogger(__name__)


class FatalSamples:
    """The samples of a run that have killed a process, and the notes that reveal further ones.

    A sample at which a worker process crashed is passed over at once. A process may also be killed from outside, for a
    reason that has nothing to do with the sample, such as a time limit of the cluster or another sample that takes all
    memory; a sample is therefore passed over only after two such deaths. Without workers, the cause is not known, and
    two deaths count as well. The list is kept, so that an interrupted run continues with the same rows.

    Args:
        sources: the sources of the blend.
        num_workers: number of worker processes of this rank; 0: this process reads.
        output: the run's folder, which keeps the list; None: nothing is kept after this process.
        rank: the data-parallel rank, for the name of its file.
        prefix: begins the names of the files, where others that read other data use the same folder.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        num_workers: int,
        output: Path | None = None,
        rank: int = 0,
        prefix: str = "",
    ):
        self._sources = sources
        self.path = None if output is None else output / FOLDER / f"{prefix}list.jsonl"
        self._causes: dict[Reading, str] = {}
        self._suspected: Counter[Reading] = Counter()
        for line in self._lines():
            self._count(line)
        file = None if self.path is None else self.path.with_name(f"{prefix}rank{rank}.note")
        left = None if file is None else Notes.left_in(file)
        if left is not None and self._exists(left):
            self._suspect(left)
        self.notes = Notes(max(num_workers, 1), None if num_workers else file)
        if num_workers:
            if file is not None:
                file.unlink(missing_ok=True)  # of a start without workers
        else:
            self.notes.use(0)

    def check(self, part: int, source: int, index: int) -> None:
        """Raises UserError if this part of the sample has killed a process."""
        if self._causes and (cause := self._causes.get(Reading(part, source, index))) is not None:
            raise UserError(f"{self._sources[source].file.source(index)}: {cause}")

    def blame(self, process: int, status: int) -> tuple[str, bool] | None:
        """Lists the sample that a dead worker was reading.

        Args:
            process: the worker's process id.
            status: its exit status; a negative one is the number of a signal.

        Returns:
            "file:line" of the sample, and whether it is passed over from now on; None if the worker read no sample.
        """
        found = self.notes.of(process)
        if found is None:
            return None
        certain = -status not in FROM_OUTSIDE
        twice = "" if certain else "twice "
        name = self._add(found, f"the data worker {death_of(status)} {twice}while reading it", certain=certain)
        return name, found in self._causes

    def _suspect(self, found: Reading) -> None:
        name = self._add(found, "the process died twice while reading it", certain=False)
        if found in self._causes:
            _log.warning("%s: the process died twice while reading it; it is passed over from now on", name)
        else:
            _log.warning(
                "%s: the last start of this run died while reading it; if it does so again, the sample is passed over",
                name,
            )

    def _add(self, found: Reading, cause: str, *, certain: bool) -> str:
        source = self._sources[found.source]
        name = self._name(found)
        part = next(word for word, number in _PARTS.items() if number == found.part)
        line = {"source": source.name, "index": found.sample, "sample": name, "part": part, "cause": cause}
        line["certain"] = certain
        self._count(line)
        if self.path is not None:
            with suppress(OSError):  # on a full disk, this start still passes it over
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return name

    def _count(self, line: dict) -> None:
        numbers = {source.name: number for number, source in enumerate(self._sources)}
        with suppress(
            KeyError, TypeError, AttributeError
        ):  # a source that is no longer in the blend, or a damaged line
            found = Reading(_PARTS[line["part"]], numbers[line["source"]], line["index"])
            if not self._exists(found) or self._name(found).rpartition("/")[2] != line["sample"].rpartition("/")[2]:
                return  # the file was changed since then, so this is another sample
            if not line["certain"]:
                self._suspected[found] += 1
            if line["certain"] or self._suspected[found] > 1:
                self._causes.setdefault(found, str(line["cause"]))

    def _lines(self) -> list[dict]:
        lines = []
        with suppress(OSError):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path is not None else ""
            for line in text.split("\n"):  # names and causes may have the other line ends
                with suppress(ValueError):  # the last line of a start that was killed may be incomplete
                    lines.append(parse_json(line))
        return lines

    def _name(self, found: Reading) -> str:
        return self._sources[found.source].file.source(found.sample)

    def _exists(self, found: Reading) -> bool:
        is_source = 0 <= found.source < len(self._sources)
        return found.part in _PARTS.values() and is_source and 0 <= found.sample < len(self._sources[found.source].file)


def death_of(status: int) -> str:
    """How a process ended, from its exit status; a negative status is the number of a signal."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        return f"was killed by signal {-status}"
    memory = ", as by the kernel when the machine runs out of memory" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}{memory})"
