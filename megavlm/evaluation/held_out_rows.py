"""Rows of a source of data.eval: its samples in their order, packed the same way in every layout."""

import copy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSettings
from megavlm.data.draft import Draft
from megavlm.data.eval_samples import meaningless_sample
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Row
from megavlm.data.rows import RowDataset
from megavlm.records.records import Kind
from megavlm.records.skipped_samples import SkippedSample
from megavlm.sources.blend import Source
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import rows_from_workers

_MOST_BYTES = 1 << 30  # of the rows of all sources that a leader keeps from one evaluation to the next


class HeldOutRows(RowDataset):
    """Samples of one source, packed one after another. Data-parallel ranks and their workers divide the rows.

    Every worker drafts all samples, which is cheap, so that all agree on what is in a row; only the worker whose turn
    it is reads the pixels. A sample that cannot be used is passed over and listed in the next row of some worker.

    Args:
        sources: all sources of data.eval.
        number: the number of the source among them.
        renderer, kind: see ``RowDataset``.
        data: the section data.
        most: maximum number of rows on all ranks; None: no limit.
        dp_rank, dp_size: this data-parallel rank, and their number.
        fatal: see ``RowDataset``.
    """

    def __init__(
        self,
        sources: list[Source],
        number: int,
        renderer: Renderer,
        kind: Kind,
        data: DataSettings,
        most: int | None,
        dp_rank: int,
        dp_size: int,
        fatal: FatalSamples,
    ):
        super().__init__(
            sources,
            renderer,
            kind,
            buffer_size=1,
            max_patches=data.max_patches_per_row,
            seed=None,
            first_worker=dp_rank,
            stride=dp_size,
            num_workers=dp_size * max(data.workers, 1),
            fatal=fatal,
        )
        self.number, self.most, self.alone = number, most, data.packing == "none"

    def rows_of(self, process: int) -> Iterator[Row]:
        """See ``WorkerRows``. Raises UserError, in the first worker, if no sample can be used."""
        worker = self.workers[(process + self.turn) % len(self.workers)]
        after = self.loader_states.get(worker, {}).get("number", -1)
        skipped: list[SkippedSample] = []
        place = -1
        for place, drafts in enumerate(self._planned(skipped)):
            if place > after and place % self.num_workers == worker:
                row = self._completed(drafts, skipped)
                if row is None:
                    continue  # the next one lists the samples of this one
                row.skipped_samples, row.loader_state = [*skipped], {"worker": worker, "number": place}
                yield row
            skipped.clear()  # those before the row of another worker are listed there
        if place < 0 and worker == 0:
            source = self.sources[self.number]
            raise UserError(
                f"data.eval, source {source.name} ({source.file.path}): none of its samples can be used; the first is "
                f"{skipped[0].sample}: {skipped[0].cause}",
                f"{skipped[0].remedy or 'repair them'}; or give other held-out samples of the kind that is trained on",
            )

    def _planned(self, skipped: list[SkippedSample]) -> Iterator[list[Draft]]:
        """The drafts of each row; adds to ``skipped`` what cannot be used."""
        waiting: list[Draft] = []
        tokens = patches = made = 0
        for index in range(len(self.sources[self.number].file)):
            draft = self.draft(self.number, index)
            if isinstance(draft, SkippedSample):
                skipped.append(draft)
                continue
            length, more = draft.padded_length(self.renderer.pad_multiple), draft.num_patches
            too_many = bool(self.max_patches) and patches + more > (self.max_patches or 0)
            if waiting and (self.alone or tokens + length > self.renderer.seq_length or too_many):
                yield waiting
                made += 1
                waiting, tokens, patches = [], 0, 0
                if made == self.most:
                    return
            waiting.append(draft)
            tokens, patches = tokens + length, patches + more
        if waiting:
            yield waiting


class HeldOutSource:
    """The rows of all sources of data.eval on one leader, kept in memory if they are few.

    Args:
        sources, renderer, kind, data, most, dp_rank, dp_size: see ``HeldOutRows``.
        output: the output folder, which keeps the list of samples that have killed a process.
    """

    def __init__(
        self,
        sources: list[Source],
        renderer: Renderer,
        kind: Kind,
        data: DataSettings,
        most: int | None,
        dp_rank: int,
        dp_size: int,
        output: Path,
    ):
        self.sources, self.renderer, self._kind, self._data, self._most = sources, renderer, kind, data, most
        self._rank, self._size, self._output = dp_rank, dp_size, output
        self._kept: dict[int, list[Row]] = {}
        self._bytes = 0

    def rows(self, number: int) -> Iterator[Row]:
        """The rows of a source on this data-parallel rank, each time the same."""
        if number in self._kept:
            yield from self._kept[number]
            return
        workers = self._data.workers
        fatal = FatalSamples(self.sources, workers, self._output, self._rank, prefix="held_out_")
        rows = HeldOutRows(
            self.sources,
            number,
            self.renderer,
            self._kind,
            self._data,
            self._most,
            self._rank,
            self._size,
            fatal,
        )
        kept: list[Row] | None = []
        try:
            with closing(rows_from_workers(rows, workers)) as found:
                for row in found:
                    self._bytes += _bytes_of(row) if kept is not None else 0
                    if kept is not None and self._bytes > _MOST_BYTES:
                        self._bytes -= sum(map(_bytes_of, [*kept, row]))
                        kept = None
                    if kept is not None:
                        kept.append(copy.deepcopy(row))  # out of the shared memory in which workers send rows
                    yield row
        finally:
            fatal.notes.close()
        if kept is not None:
            self._kept[number] = kept


def filler(renderer: Renderer) -> Row:
    """A row without targets, for a data-parallel rank that must run forward passes together with the others."""
    sample = meaningless_sample(renderer)
    sample.annotations = Annotations(ref_logprob=0.0)
    return renderer.pack([sample])


def _bytes_of(row: Row) -> int:
    return sum(value.nbytes for value in vars(row).values() if isinstance(value, torch.Tensor))
