"""Datasets in megatron-energon's terms: drafts of a JSONL file, and rows packed from drafts.

Energon's own JSONL source gives each worker a contiguous piece of the file, shuffles pieces rather than samples, and
writes an index beside the user's data. `DraftDataset` deals samples out one by one instead: without shuffling the ranks
together see the file in its order, with shuffling every sample may come next to every other, and an epoch is exact
for any number of ranks and workers. Its packing empties the buffer before refilling it, which leaves a half-empty row
each time; `RowDataset` packs among a buffer that is always full. Blending, savable state and worker processes are
energon's.
"""

from collections.abc import Iterator
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.flavors.base_dataset import SavableDataset
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from megavlm.config.errors import UserError
from megavlm.data.jsonl import JsonlFile
from megavlm.data.order import shuffled
from megavlm.data.packing import best_fit
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, Renderer
from megavlm.data.row import Row, aligned

_FIRST_DRAFTS = 50  # that wait when the first row is filled


class DraftDataset(SavableDataset[Draft]):
    """Drafts of one file, endlessly, epoch after epoch.

    The file's epochs, laid end to end, are one sequence of places; worker w of W on rank r of R takes the places
    r + R * w, and every R * W-th from there. As batches take rows from the workers in turn, the rows that all ranks see
    at one time are neighbours in that sequence.

    Args:
        file: the samples.
        renderer: makes drafts of them.
        kind: what is learned.
        key: of the order of each epoch (from the seed); None for the order of the file.
        worker_config: this rank and its workers.
    """

    _savable_fields = ("_count",)

    def __init__(
        self, file: JsonlFile, renderer: Renderer, kind: Kind, *, key: int | None, worker_config: WorkerConfig
    ):
        super().__init__(worker_config)
        self._file, self._renderer, self._kind, self._key = file, renderer, kind, key
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._count = 0  # drafts that this worker has made

    def __iter__(self) -> Iterator[Draft]:
        ranks, rank = self.worker_config.world_size, self.worker_config.rank
        workers = max(self.worker_config.num_workers, 1)
        first = rank + ranks * self.worker_config.rank_worker_id()
        while True:
            epoch, place = divmod(first + ranks * workers * self._count, len(self._file))
            self._count += 1
            index = place if self._key is None else shuffled(place, len(self._file), self._key + epoch)
            yield self._draft(index)

    def _draft(self, index: int) -> Draft:
        file = self._file
        record, source = file.read(index), file.source(index)
        draft = self._renderer.draft(record, file.path.parent, source, kind=self._kind, index=index)
        draft.__restore_key__ = (type(self).__name__, index)  # by which energon saves a sample that waits
        return draft

    def can_restore_sample(self) -> bool:
        return True

    def restore_sample(self, restore_key: tuple) -> Draft:
        return self._draft(restore_key[1])

    def worker_has_samples(self) -> bool:
        return True

    def len_worker(self, worker_idx: int | None = None) -> int:
        return len(self._file) // max(self.worker_config.num_workers, 1)

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "path": str(self._file.path), "samples": len(self._file)}


class RowDataset(BaseWrapperDataset[Draft, Row]):
    """Rows of packed samples, from a buffer of drafts that is refilled after each row.

    The buffer is small at first and grows with each row, so that training need not wait for a thousand drafts.

    Args:
        drafts: where samples come from.
        renderer: completes and packs them.
        buffer_size: most drafts among which a row is filled; 1 makes a row of each sample.
    """

    _savable_fields = ("_buffer", "_wanted")

    def __init__(self, drafts: SavableDataset[Draft], renderer: Renderer, buffer_size: int):
        super().__init__(drafts, worker_config=drafts.worker_config)
        self._renderer, self.buffer_size = renderer, buffer_size
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._buffer = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._wanted = min(_FIRST_DRAFTS, self.buffer_size)  # drafts that should wait when a row is filled

    def __iter__(self) -> Iterator[Row]:
        self._buffer.worker_start()  # renders again the drafts that waited when the state was saved
        drafts = iter(self.dataset)
        while True:
            while len(self._buffer.buffer) < self._wanted:
                self._buffer.append(next(drafts))
            self._wanted = min(self._wanted * 9 // 8 + 1, self.buffer_size)
            lengths = [aligned(draft.length, self._renderer.align) for draft in self._buffer]
            places = best_fit(lengths, self._renderer.seq_length)
            chosen = [self._buffer[place] for place in places]
            for place in reversed(places):
                self._buffer.pop(place)
            yield self._renderer.complete_row(chosen)

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "buffer": self.buffer_size, "dataset": self.dataset.config()}


class ErrorsAsItems(BaseWrapperDataset[Row, Row | UserError]):
    """Hands a UserError over as the last item, so that it leaves a worker process as it is and in its turn.

    (An exception that leaves by itself arrives as the text of a traceback.)
    """

    def reset_state_own(self) -> None:
        pass

    def __iter__(self) -> Iterator[Row | UserError]:
        try:
            yield from self.dataset
        except UserError as error:
            yield error

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict[str, Any]:
        return self.dataset.config()
