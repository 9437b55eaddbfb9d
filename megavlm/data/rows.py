"""The work of a data worker: it draws samples, renders them, and packs them into a stream of rows."""

import copy
from collections import Counter
from collections.abc import Iterator

from megavlm.base.command_line import command
from megavlm.base.errors import UserError
from megavlm.data.answer_groups import draft_unit
from megavlm.data.draft import Draft, DraftError
from megavlm.data.eval_samples import empty_row
from megavlm.data.packing import first_fill, next_fill, take_row
from megavlm.data.processor import limits_of
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.row_plan import RowPlan
from megavlm.data.sample_order import SampleOrder
from megavlm.records.records import Kind
from megavlm.records.skipped_samples import TOO_LONG, TOO_LONG_YET, SkippedSample, UnfitSample
from megavlm.sources.blend import Source, samples_of_epochs
from megavlm.sources.open_files import SampleFile
from megavlm.workers.current_sample import PIXELS, RECORD, reading
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import WorkerRows

_MOST_SKIPPED = 1000  # after this many consecutive skipped samples, a source is considered unusable


class RowDataset(WorkerRows[Row]):
    """Rows of packed samples. Each worker process runs one copy of this data set.

    A row is filled from a buffer of drafts, which is refilled after each row. The buffer is small at first and grows
    with each row, so that training does not start by waiting for a thousand drafts. Samples that cannot be used are
    skipped and listed in the next row (``Row.skipped_samples``). Each row also carries the worker's state after it
    (``Row.loader_state``). A worker that receives this state through ``loader_states`` continues with exactly the row
    that would have come next.

    Args:
        sources: the sources of the blend.
        renderer: makes, completes and packs drafts.
        kind: what is trained on.
        buffer_size: maximum number of drafts among which those of a row are chosen; 1 makes a row of each sample.
        max_patches: maximum number of patches in a row; None: no limit.
        seed: seed of the sample order; None: the order of the files.
        first_worker: global number of this rank's first worker.
        stride: difference between the global numbers of this rank's workers: first, first + stride, …
        num_workers: number of workers on all ranks.
        fatal: the samples that have killed a process and are passed over; None: none.
        plan: what the rows depend on besides. After the last sample of the last epoch come empty rows.

    Attributes:
        turn: the number of this rank's worker that gives the first row.
        loader_states: the states from which workers continue, by global worker number.
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
        fatal: FatalSamples | None = None,
        plan: RowPlan = RowPlan(),  # noqa: B008 (immutable)
    ):
        self.sources, self.renderer, self.kind, self.buffer_size = sources, renderer, kind, buffer_size
        self.max_patches, self.seed, self.num_workers = max_patches, seed, num_workers
        self.workers = range(first_worker, num_workers, stride)
        self.fatal = fatal or FatalSamples(sources, 0)
        self.plan, self.ends = plan, samples_of_epochs(sources, plan.epochs) if plan.epochs else None
        self._longest = renderer.seq_length
        self.turn = 0
        self.loader_states: dict[int, dict] = {}

    def rows_of(self, process: int) -> Iterator[Row]:
        """The rows of a worker process of this rank (see ``WorkerRows``)."""
        return self._rows(self.workers[(process + self.turn) % len(self.workers)])

    def taken(self, row: Row) -> None:
        """Workers that start from now on continue after this row, which must be the next one in turn."""
        assert row.loader_state is not None, "each row of a worker carries its state"
        self.loader_states[row.loader_state["worker"]] = row.loader_state
        self.turn = (self.turn + 1) % len(self.workers)

    def initial_state(self, worker: int) -> dict:
        """The state of a worker that has not made a row yet."""
        wanted = first_fill(self.buffer_size)
        order = self._sample_order(worker).state
        return {"worker": worker, "draws": order, "waiting": [], "wanted": wanted, "row": worker}

    def _sample_order(self, worker: int) -> SampleOrder:
        shares, counts = [s.share for s in self.sources], [len(s.file) for s in self.sources]
        limits = [s.max_tokens for s in self.sources]
        return SampleOrder(shares, counts, self.seed, worker, self.num_workers, self.ends, limits)

    def _rows(self, worker: int) -> Iterator[Row]:
        counts = [len(source.file) for source in self.sources]
        state = self.loader_states.get(worker) or self.initial_state(worker)
        order = self._sample_order(worker)
        order.state = copy.deepcopy(state["draws"])
        drawn = order.drawn
        wanted, row_number = state["wanted"], state.get("row", worker)
        waiting: list[Draft] = []
        skipped_samples: list[SkippedSample] = []
        # for each source, the distinct samples that were skipped since its last usable one
        seen: list[set[int]] = [set() for _ in self.sources]

        def add(source: int, index: int) -> int:
            """Adds a sample to those that wait, or to the skipped ones; returns the number of its tokens."""
            draft = self.draft(source, index)
            if isinstance(draft, Draft):
                waiting.append(draft)
                seen[source].clear()
                return draft.num_tokens
            skipped_samples.append(draft)
            seen[source].add(index)
            # Give up if all samples of the source were skipped, or many of them, or if the same few are skipped again
            # and again without a row in between, because a worker may never draw the other samples of a source.
            if len(seen[source]) >= min(_MOST_SKIPPED, counts[source]) or len(skipped_samples) >= _MOST_SKIPPED:
                raise _useless(self.sources[source], len(seen[source]), draft)
            return 0

        for source, index, *room in state["waiting"]:
            self.renderer.seq_length = room[0] if room else self.renderer.seq_length
            add(source, index)
        while True:
            if self.plan.length_ramp:
                self.renderer.seq_length = self.plan.length(row_number, self._longest)
            while len(waiting) < wanted and (sample := next(order, None)) is not None:
                order.count(sample[0], add(*sample))
            wanted = next_fill(wanted, self.buffer_size)
            if waiting:
                chosen = take_row(waiting, self.renderer.seq_length, self.renderer.pad_multiple, self.max_patches)
                row = self._completed(chosen, skipped_samples)
            else:  # all sources have ended
                row = empty_row(self.renderer)
            if row is None:
                if len(skipped_samples) >= min(_MOST_SKIPPED, 2 * sum(counts)):
                    raise _useless(
                        self.sources[skipped_samples[-1].source_id], len(skipped_samples), skipped_samples[-1]
                    )
                continue
            row.skipped_samples, skipped_samples = skipped_samples, []
            before, drawn = drawn, order.drawn
            row.newly_read = [new - old for (_, old), (_, new) in zip(before, drawn, strict=True)]
            row.loader_state = {
                "worker": worker,
                "draws": copy.deepcopy(order.state),
                "waiting": [(draft.source_id, draft.index, *filter(None, [draft.room])) for draft in waiting],
                "wanted": wanted,
                "row": row_number + self.num_workers,
            }
            row_number += self.num_workers
            yield row

    def draft(self, source: int, index: int) -> Draft | SkippedSample:
        """Sample `index` of source number `source` without its pixels, or the reason why it is skipped."""
        file = self.sources[source].file
        name = file.source(index)
        try:
            self.fatal.check(RECORD, source, index)
            with reading(RECORD, source, index):
                draft = self._drafted(file, index)
            if self.max_patches and draft.num_patches > self.max_patches:
                raise UnfitSample(
                    TOO_LONG,
                    f"{name}: the sample has {draft.num_patches} patches, more than data.max_patches_per_row",
                    f"raise data.max_patches_per_row, or lower {limits_of(draft.media)}",
                )
        except MemoryError:
            raise
        except Exception as error:  # whatever a file contains, an error in it must cost only this sample
            return SkippedSample.of(source, name, error, index)
        for sample in (draft, *draft.followers):
            sample.source_id = source
            self.plan.weigh(sample, self.sources[source].loss_weight)
        draft.room = self.renderer.seq_length if self.plan.length_ramp else 0
        return draft

    def _drafted(self, file: SampleFile, index: int) -> Draft:
        """The draft of a sample. One that is unfit only for the rows of ``length_ramp`` has a kind of its own."""
        length = self.renderer.seq_length
        try:
            return draft_unit(self.renderer, file, index, self.kind)
        except UnfitSample as error:
            if length == self._longest:
                raise
            early = error
        self.renderer.seq_length = self._longest
        try:
            draft_unit(self.renderer, file, index, self.kind)
        finally:
            self.renderer.seq_length = length
        raise UnfitSample(TOO_LONG_YET, early.message, "it fits after data.length_ramp; raise the lengths of the ramp")

    def reread(self, source: int, index: int) -> SkippedSample | None:
        """Reads a sample with its pixels; None if it can be used, otherwise the reason why it is skipped."""
        draft = self.draft(source, index)
        if isinstance(draft, SkippedSample):
            return draft
        skipped: list[SkippedSample] = []
        self._completed([draft], skipped)
        return skipped[0] if skipped else None

    def drawn(self, worker: int, states: dict[int, dict]) -> list[tuple[int, int]]:
        """``SampleOrder.drawn`` of a worker as of these states; the first number without waiting samples."""
        state = states.get(worker) or self.initial_state(worker)
        order = self._sample_order(worker)
        order.state = state["draws"]
        waiting = Counter(source for source, *_ in state["waiting"])
        return [(taken - waiting[source], new) for source, (taken, new) in enumerate(order.drawn)]

    def has_given(self, worker: int, states: dict[int, dict]) -> list[bool]:
        """``SampleOrder.has_given`` of a worker as of these states, for each source."""
        order = self._sample_order(worker)
        order.state = (states.get(worker) or self.initial_state(worker))["draws"]
        return [order.has_given(source) for source in range(len(self.sources))]

    def _completed(self, chosen: list[Draft], skipped_samples: list[SkippedSample]) -> Row | None:
        """The row of the drafts whose pixels can all be read; None if there are none."""
        chosen = [draft for draft in chosen if self._may_be_read(draft, skipped_samples)]
        while chosen:
            try:
                return self.renderer.complete_row(chosen)
            except DraftError as error:
                draft = chosen.pop(error.place)
                skipped = SkippedSample.of(draft.source_id, draft.source, error.__cause__, draft.index)
                skipped_samples.append(skipped)
        return None

    def _may_be_read(self, draft: Draft, skipped_samples: list[SkippedSample]) -> bool:
        """Whether the pixels of the draft have not yet killed a process; otherwise, the sample is skipped."""
        try:
            self.fatal.check(PIXELS, draft.source_id, draft.index)
        except UserError as error:
            skipped_samples.append(SkippedSample.of(draft.source_id, draft.source, error, draft.index))
            return False
        return True


def _useless(source: Source, count: int, last: SkippedSample) -> UserError:
    return UserError(
        f"data source {source.name} ({source.file.path}): {count} consecutive samples cannot be used; "
        f"the last of them is {last.sample}: {last.cause}",
        f"{last.remedy or 'repair them'}. Look at all of them with: {command('data inspect')}",
    )
