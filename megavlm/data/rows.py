"""What a data worker does: draws samples, renders them, packs them, and hands out rows without end."""

import copy
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset

from megavlm.base.errors import UserError
from megavlm.data.draws import Draws
from megavlm.data.faults import TOO_LONG, Fault, UnfitSample
from megavlm.data.packing import best_fit
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, DraftError, Renderer
from megavlm.data.row import Row
from megavlm.data.sources import Source
from megavlm.data.units import draft_unit

_FIRST_DRAFTS = 50  # that wait when the first row is filled
_MOST_FAULTS = 1000  # one after another: something is wrong with all of a source


class RowDataset(IterableDataset[Row]):
    """Rows of packed samples. Each worker process runs one copy of it.

    A row is filled from a buffer of drafts, which is refilled after each. The buffer is small at first and grows with
    each row, so that training need not wait for a thousand drafts. Samples that cannot be used are passed over; the
    next row tells of them (``Row.faults``), and of the place behind it (``Row.place``), from which a worker that is
    given it in ``places`` continues with the very row that would have come next.

    Args:
        sources: of the blend. renderer: makes drafts, completes and packs them. kind: what is learned.
        buffer_size: most drafts among which a row is filled; 1 makes a row of each sample.
        max_patches: most patches in a row; None: as many as come.
        seed: of the order; None: the files' own.
        first_worker, stride: numbers of this rank's workers among all: first, first + stride, …
        num_workers: all of them.
    """

    def __init__(
        self,
        sources: list[Source],
        renderer: Renderer,
        kind: Kind,
        *,
        buffer_size: int,
        max_patches: int | None,
        seed: int | None,
        first_worker: int,
        stride: int,
        num_workers: int,
    ):
        self.sources, self.renderer, self.kind, self.buffer_size = sources, renderer, kind, buffer_size
        self.max_patches, self.seed, self.num_workers = max_patches, seed, num_workers
        self.workers = range(first_worker, num_workers, stride)
        self.turn = 0  # which of this rank's workers gives the first row
        self.places: dict[int, dict] = {}  # of workers that continue

    def __iter__(self) -> Iterator[Row | UserError]:
        """Rows, and where none can come any more, as the last item, why.

        (An exception that leaves a worker process by itself arrives as the text of a traceback.)
        """
        info = torch.utils.data.get_worker_info()
        process = info.id if info is not None else 0
        worker = self.workers[(process + self.turn) % len(self.workers)]
        try:
            yield from self._rows(worker)
        except UserError as error:
            yield error

    def start_of(self, worker: int) -> dict:
        """The place of a worker that has made no row yet."""
        wanted = min(_FIRST_DRAFTS, self.buffer_size)
        return {"worker": worker, "draws": self._draws(worker).state, "waiting": [], "wanted": wanted}

    def _draws(self, worker: int) -> Draws:
        shares, counts = [s.share for s in self.sources], [len(s.file) for s in self.sources]
        return Draws(shares, counts, self.seed, worker, self.num_workers)

    def _rows(self, worker: int) -> Iterator[Row]:
        counts = [len(source.file) for source in self.sources]
        place = self.places.get(worker) or self.start_of(worker)
        draws = self._draws(worker)
        draws.state = copy.deepcopy(place["draws"])
        wanted, waiting, faults = place["wanted"], [], []
        seen: list[set[int]] = [set() for _ in self.sources]  # distinct bad samples of each since its last good one

        def add(source: int, index: int) -> None:
            draft = self.draft(source, index)
            if isinstance(draft, Draft):
                waiting.append(draft)
                seen[source].clear()
                return
            faults.append(draft)
            seen[source].add(index)
            # all that there are; or many; or the same few, as long as no row comes: a worker may not meet others
            if len(seen[source]) >= min(_MOST_FAULTS, counts[source]) or len(faults) >= _MOST_FAULTS:
                raise _useless(self.sources[source], len(seen[source]), draft)

        for source, index in place["waiting"]:
            add(source, index)
        while True:
            while len(waiting) < wanted:
                add(*next(draws))
            wanted = min(wanted * 9 // 8 + 1, self.buffer_size)
            lengths = [draft.room(self.renderer.align) for draft in waiting]
            patches = [draft.num_patches for draft in waiting] if self.max_patches else None
            places = best_fit(lengths, self.renderer.seq_length, patches, self.max_patches)
            chosen = [waiting[place] for place in places]
            for place in reversed(places):
                waiting.pop(place)
            row = self._completed(chosen, faults)
            if row is None:
                if len(faults) >= min(_MOST_FAULTS, 2 * sum(counts)):
                    raise _useless(self.sources[faults[-1].source_id], len(faults), faults[-1])
                continue
            row.faults, faults = faults, []
            row.place = {
                "worker": worker,
                "draws": copy.deepcopy(draws.state),
                "waiting": [(draft.source_id, draft.index) for draft in waiting],
                "wanted": wanted,
            }
            yield row

    def draft(self, source: int, index: int) -> Draft | Fault:
        """Sample `index` of source number `source` without its pixels, or what is wrong with it."""
        file = self.sources[source].file
        name = file.source(index)
        try:
            draft = draft_unit(self.renderer, file, index, self.kind)
            if self.max_patches and draft.num_patches > self.max_patches:
                raise UnfitSample(
                    TOO_LONG,
                    f"{name}: the sample has {draft.num_patches} patches, more than data.row_patches",
                    "raise data.row_patches, or lower data.max_pixels or data.video_max_frames",
                )
        except MemoryError:
            raise
        except Exception as error:  # whatever a file may hold, it costs one sample
            return Fault.of(source, name, error)
        for sample in (draft, *draft.followers):
            sample.source_id = source
        return draft

    def _completed(self, chosen: list[Draft], faults: list[Fault]) -> Row | None:
        """The row of those that have all their pixels; None if none has."""
        while chosen:
            try:
                return self.renderer.complete_row(chosen)
            except DraftError as error:
                draft = chosen.pop(error.place)
                faults.append(Fault.of(draft.source_id, draft.source, error.__cause__))
        return None


def _useless(source: Source, count: int, last: Fault) -> UserError:
    return UserError(
        f"data source {source.name} ({source.file.path}): {count} samples one after another cannot be used; "
        f"the last one, {last.sample}: {last.cause}",
        "look at all of them with: megavlm data inspect",
    )
