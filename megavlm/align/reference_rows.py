"""The rows of which the reference's log-probabilities are computed: every sample of every source once."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megavlm.base.errors import UserError
from megavlm.data.answer_groups import draft_unit
from megavlm.data.draft import Draft, DraftError
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.media.files import File
from megavlm.records.records import Kind
from megavlm.sources.blend import Source
from megavlm.workers.current_sample import PIXELS, RECORD, reading
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import WorkerRows


@dataclass(frozen=True)
class AnswerData:
    """The training data of a leader: its sources, the renderer of their samples, and the samples to pass over."""

    sources: list[Source]
    renderer: Renderer
    fatal: FatalSamples


@dataclass(frozen=True)
class Progress:
    """What an interrupted start has computed.

    Attributes:
        places: where each of all workers continues, if there are as many workers as then. Their rows are the same as
            without the interruption.
        done: otherwise, bool [samples] for each source: the samples that have a log-probability.
    """

    places: dict[int, int]
    done: Sequence[np.ndarray] | None = None


def unimportant_row(renderer: Renderer) -> Row:
    """A row for a data-parallel rank that has no samples but must run forward passes together with the others."""
    draft = renderer.draft({"text": "no sample"}, File, "a row without samples", kind="pretrain")
    return renderer.complete_row([draft])


class AllAnswers(WorkerRows[Row]):
    """Samples packed in order, without those that cannot be used; data-parallel ranks and their workers divide them.

    Args:
        data: the data of this leader.
        kind: how the records are rendered.
        dp_rank: this data-parallel rank.
        dp_size: the number of data-parallel ranks.
        num_workers: the number of worker processes of each of them; 0: one process reads.
        progress: what need not be computed again.

    Attributes:
        places: for each worker (by its number among all ranks) that has given a row, the place of the first sample of
            its next row. Places number the samples of all sources.
    """

    def __init__(
        self,
        data: AnswerData,
        kind: Kind,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
        progress: Progress | None = None,
    ):
        self.sources, self.renderer, self.fatal, self.kind = data.sources, data.renderer, data.fatal, kind
        self.dp_rank, self.dp_size, self.num_workers = dp_rank, dp_size, dp_size * max(num_workers, 1)
        mine = range(dp_rank, self.num_workers, dp_size)
        self.places = {w: place for w, place in progress.places.items() if w in mine} if progress else {}
        self._done = progress.done if progress else None

    def taken(self, row: Row) -> None:
        """See ``WorkerRows``."""
        assert row.loader_state is not None, "each row of a worker carries its state"
        self.places[row.loader_state["worker"]] = row.loader_state["place"]

    def rows_of(self, process: int) -> Iterator[Row]:
        """See ``WorkerRows``."""
        worker = self.dp_rank + self.dp_size * process
        waiting: list[Draft] = []
        filled = 0  # tokens of the waiting drafts
        ends = list(accumulate(len(source.file) for source in self.sources))
        for place in range(self.places.get(worker, worker), ends[-1], self.num_workers):
            source = bisect_right(ends, place)
            index = place - (ends[source - 1] if source else 0)
            if self._done is not None and self._done[source][index]:
                continue
            try:
                self.fatal.check(RECORD, source, index)
                with reading(RECORD, source, index):
                    draft = draft_unit(self.renderer, self.sources[source].file, index, self.kind)
            except Exception:  # training reports broken samples
                continue
            for sample in (draft, *draft.followers):
                sample.source_id = source
            tokens = draft.padded_length(self.renderer.pad_multiple)
            if waiting and filled + tokens > self.renderer.seq_length:
                yield from self._row(waiting, worker, place)
                waiting, filled = [], 0
            waiting.append(draft)
            filled += tokens
        yield from self._row(waiting, worker, ends[-1])

    def _row(self, drafts: list[Draft], worker: int, place: int) -> Iterator[Row]:
        drafts = [draft for draft in drafts if self._may_be_read(draft)]
        while drafts:
            try:
                row = self.renderer.complete_row(drafts)
            except DraftError as error:
                drafts.pop(error.place)
                continue
            row.loader_state = {"worker": worker, "place": place}
            yield row
            return

    def _may_be_read(self, draft: Draft) -> bool:
        try:
            self.fatal.check(PIXELS, draft.source_id, draft.index)
        except UserError:
            return False
        return True
