"""The samples of a file that is read once, in its order: rendered in worker processes, passing over the bad ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import IterableDataset

from megavlm.data.answer_groups import separate_answers
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample
from megavlm.data.shared_memory import received, sent
from megavlm.data.worker_processes import in_workers
from megavlm.media.files import File, Find
from megavlm.records.questions import question_of, reference_of
from megavlm.records.records import Kind, check_record
from megavlm.records.skipped_samples import SkippedSample
from megavlm.sources.blend import SampleFile


@dataclass(kw_only=True)
class EvalSample(Sample):
    """A sample, and what tells a reader which one it is (``about``, the fields of a line of results).

    ``index`` is twice the number in the file; 1 more for the rejected answer of a pair.
    """

    about: dict[str, Any]


class EvalSamples:
    """An iterator over the usable samples of a file on one data-parallel rank, in the order of the file.

    ``about`` of a sample has ``index`` (its number in the file), ``sample`` ("file:line"), ``question``, ``media``
    (pictures, then videos, as in the record) and, if the record has a reference answer, ``reference``. With the kind
    "tune", a preference pair is two samples: ``about`` of each also has ``side``, "chosen" or "rejected".

    Args:
        file: the samples.
        renderer: renders them.
        kind: "prompt" or "tune".
        indices: the numbers of the samples to read.
        workers: number of processes that render them; 0: this process.

    Attributes:
        about: what is known of each sample that was read, by ``EvalSample.index``.
    """

    def __init__(self, file: SampleFile, renderer: Renderer, kind: Kind, indices: Sequence[int], workers: int):
        self.about: dict[int, dict[str, Any]] = {}
        self._skipped: list[SkippedSample] = []
        self._loader = in_workers(_Rendering(file, renderer, kind, indices), min(workers, len(indices)))

    def __iter__(self) -> Iterator[Sample]:
        items: Iterator[Any] = received(iter(self._loader))
        for item in items:
            if isinstance(item, SkippedSample):
                self._skipped.append(item)
            else:
                self.about[item.index] = item.about
                yield item

    def take_skipped(self) -> list[SkippedSample]:
        """The samples that were passed over since the last call."""
        taken, self._skipped = self._skipped, []
        return taken


def meaningless_sample(renderer: Renderer) -> Sample:
    """A sample without targets, for a rank that must compute with the others and has read no sample that it could."""
    return renderer.encode({"text": "."}, File, "no file", kind="prompt")


@dataclass(eq=False)
class _Rendering(IterableDataset):
    """Each worker renders every n-th of the samples; torch takes one item of each worker in turn."""

    file: SampleFile
    renderer: Renderer
    kind: Kind
    indices: Sequence[int] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        items: Iterator[Any] = self._items(self.indices if info is None else self.indices[info.id :: info.num_workers])
        yield from sent(items)

    def _items(self, indices: Sequence[int]) -> Iterator[EvalSample | SkippedSample]:
        for index in indices:
            name = self.file.source(index)
            try:
                record, find = self.file.read(index)
                answers = separate_answers(record, name) if self.kind == "tune" else [(None, record)]
                samples = [self._sample(one, find, index, side) for side, one in answers]
            except MemoryError:
                raise
            except Exception as error:  # whatever a file contains, an error in it must cost only this sample
                yield SkippedSample.of(0, name, error, index)
            else:
                yield from samples

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
