"""The samples of a file that is read once, in its order: rendered in worker processes, passing over the bad ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.data.answer_groups import separate_answers
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row, Sample
from megavlm.media.files import File, Find
from megavlm.records.questions import question_of, reference_of
from megavlm.records.records import Kind, check_record
from megavlm.records.skipped_samples import SkippedSample
from megavlm.sources.blend import SampleFile, Source
from megavlm.workers.current_sample import RECORD, reading
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import WorkerRows, rows_from_workers


@dataclass(kw_only=True)
class EvalSample(Sample):
    """A sample, and what tells a reader which one it is (``about``, the fields of a line of results).

    ``index`` is twice the number in the file; 1 more for the rejected answer of a pair.
    """

    about: dict[str, Any]


class EvalSamples:
    """An iterator over the usable samples of a file on one data-parallel rank, in the order of the file.

    A sample that kills the process that reads it is passed over (see ``rows_from_workers`` and ``FatalSamples``).
    ``about`` of a sample has ``index`` (its number in the file), ``sample`` ("file:line"), ``question``, ``media``
    (pictures, then videos, as in the record) and, if the record has a reference answer, ``reference``. With the kind
    "tune", a preference pair is two samples: ``about`` of each also has ``side``, "chosen" or "rejected".

    Args:
        file: the samples.
        renderer: renders them.
        kind: "prompt" or "tune".
        indices: the numbers of the samples to read.
        workers: number of processes that render them; 0: this process.
        output: the folder that keeps the list of samples that have killed a process; None: it is not kept.
        rank: this data-parallel rank.

    Attributes:
        about: what is known of each sample that was read, by ``EvalSample.index``.
    """

    def __init__(
        self,
        file: SampleFile,
        renderer: Renderer,
        kind: Kind,
        indices: Sequence[int],
        workers: int,
        output: Path | None = None,
        rank: int = 0,
    ):
        self.about: dict[int, dict[str, Any]] = {}
        self._skipped: list[SkippedSample] = []
        self._workers = min(workers, len(indices))
        fatal = FatalSamples([Source("data.eval", file, 1.0)], self._workers, output, rank, prefix="eval_")
        self._rendered = _Rendered(file, renderer, kind, indices, max(self._workers, 1), fatal)

    def __iter__(self) -> Iterator[Sample]:
        try:
            for found in rows_from_workers(self._rendered, self._workers):
                for item in found:
                    if isinstance(item, SkippedSample):
                        self._skipped.append(item)
                    else:
                        self.about[item.index] = item.about
                        yield item
        finally:
            self._rendered.fatal.notes.close()

    def take_skipped(self) -> list[SkippedSample]:
        """The samples that were passed over since the last call."""
        taken, self._skipped = self._skipped, []
        return taken


def meaningless_sample(renderer: Renderer) -> Sample:
    """A sample without targets, for a rank that must compute with the others and has read no sample that it could."""
    return renderer.encode({"text": "."}, File, "no file", kind="prompt")


def empty_row(renderer: Renderer) -> Row:
    """A row without samples and targets, for a rank whose data are used up before those of others.

    It has a few tokens that are not padding, because experts compute means over such tokens.
    """
    row = renderer.pack([meaningless_sample(renderer)])
    nothing: list = []
    return replace(
        row,
        num_samples=0,
        num_tokens=0,
        sources=nothing,
        indices=nothing,
        source_ids=nothing,
        annotations=nothing,
        remarks=nothing,
    )


class _Rendered(WorkerRows[list[EvalSample | SkippedSample]]):
    """What each number of the file gives: a sample, the two of a pair, or the reason why there is none.

    Each worker renders every n-th number; torch takes one item of each worker in turn, so that they come in order.
    """

    def __init__(
        self,
        file: SampleFile,
        renderer: Renderer,
        kind: Kind,
        indices: Sequence[int],
        workers: int,
        fatal: FatalSamples,
    ):
        self.file, self.renderer, self.kind, self.indices = file, renderer, kind, indices
        self.workers, self.fatal = workers, fatal
        self._done = 0  # numbers whose samples have been taken

    def taken(self, row: list[EvalSample | SkippedSample]) -> None:
        """See ``WorkerRows``."""
        self._done += 1

    def rows_of(self, process: int) -> Iterator[list[EvalSample | SkippedSample]]:
        """See ``WorkerRows``."""
        for index in self.indices[self._done :][process :: self.workers]:
            name = self.file.source(index)
            try:
                self.fatal.check(RECORD, 0, index)
                with reading(RECORD, 0, index):
                    record, find = self.file.read(index)
                    answers = separate_answers(record, name) if self.kind == "tune" else [(None, record)]
                    samples = [self._sample(one, find, index, side) for side, one in answers]
            except MemoryError:
                raise
            except Exception as error:  # whatever a file contains, an error in it must cost only this sample
                yield [SkippedSample.of(0, name, error, index)]
            else:
                yield [*samples]

    def _sample(self, record: Any, find: Find, index: int, side: str | None) -> EvalSample:
        name = self.file.source(index)
        number = 2 * index + (side == "rejected")
        sample = self.renderer.encode(record, find, name, kind=self.kind, index=number)
        checked, reference = check_record(record, self.kind, name), reference_of(record)
        about = {
            "index": index,
            "sample": name,
            "side": side,
            "question": question_of(checked),
            "media": [*checked.images, *checked.videos],
            "reference": reference,
        }
        known = {key: value for key, value in about.items() if value is not None}
        return EvalSample(**vars(sample), about=known)
