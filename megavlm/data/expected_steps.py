"""How many steps the epochs of a run will have: the work of its data workers in numbers, without any pixels."""

from megavlm.base.heartbeat import beat
from megavlm.data.draft import Draft
from megavlm.data.packing import first_fill, next_fill, take_row
from megavlm.data.rows import RowDataset
from megavlm.data.sample_order import SampleOrder
from megavlm.sources.blend import evenly

_DRAFTED = 400  # samples of a source that are looked at; the others are taken to be like their neighbours among them
_COUNTED = 20_000  # samples that are packed to the end; of more, the first rows stand for all


def expected_steps(dataset: RowDataset) -> tuple[int, bool]:
    """Packs samples as the data workers of all ranks will do, up to the end of the last epoch.

    Args:
        dataset: the rows of a rank, with a plan that has epochs.

    Returns:
        The number of steps, and whether it is exact, provided that all pictures and videos can be read.
    """
    assert dataset.ends is not None, "the plan has epochs"
    counts, total, plan = [len(source.file) for source in dataset.sources], sum(dataset.ends), dataset.plan
    drafts = _Drafts(dataset, counts)
    cut = bool(plan.length_ramp) and dataset.renderer.truncates  # drafts have the full length, and rows cut them
    if total <= _COUNTED:
        last = max(_last_row(dataset, drafts, worker, dataset.num_workers)[0] for worker in range(dataset.num_workers))
        return plan.place(max(last, 0))[0], max(counts) <= _DRAFTED and not cut
    rows, used = _last_row(dataset, drafts, 0, 1, _COUNTED)
    left, step = (rows + 1) * total / used, 0  # rows of full length
    for step in range(1, max(plan.length_ramp, default=0) + 1):
        first = plan.first_row(step)
        left -= (plan.first_row(step + 1) - first) * plan.length(first, drafts.longest) / drafts.longest
        if left <= 0:
            return step, False
    return plan.place(plan.first_row(step + 1) + max(round(left), 1) - 1)[0], False


def _last_row(
    dataset: RowDataset, drafts: "_Drafts", worker: int, num_workers: int, most: int | None = None
) -> tuple[int, int]:
    """The number of the last row of a worker (-1: none), or of the row in which ``most`` samples are used, and those.

    With ``most``, all rows have the full length.
    """
    shares = [source.share for source in dataset.sources]
    order = SampleOrder(shares, drafts.counts, dataset.seed, worker, num_workers, dataset.ends)
    wanted, row, last, used = first_fill(dataset.buffer_size), worker, -1, 0
    waiting: list[Draft] = []
    while most is None or used < most:
        length = drafts.longest if most else dataset.plan.length(row, drafts.longest)
        while len(waiting) < wanted and (sample := next(order, None)) is not None:
            draft = drafts.of(*sample)
            if draft is not None and draft.padded_length(dataset.renderer.pad_multiple) <= length:
                waiting.append(draft)
            else:
                used += 1
        if not waiting:
            break
        wanted = next_fill(wanted, dataset.buffer_size)
        used += len(take_row(waiting, length, dataset.renderer.pad_multiple, dataset.max_patches))
        last, row = row, row + num_workers
    return last, used


class _Drafts:
    """Drafts of evenly spaced samples of each source, each of which stands for its neighbours.

    Args:
        dataset: drafts them.
        counts: the number of samples of each source.

    Attributes:
        longest: number of tokens of the longest rows.
    """

    def __init__(self, dataset: RowDataset, counts: list[int]):
        self.counts, self.longest = counts, dataset.renderer.seq_length
        self._dataset, self._chosen = dataset, [evenly(count, _DRAFTED) for count in counts]
        self._known: dict[tuple[int, int], Draft | None] = {}

    def of(self, source: int, index: int) -> Draft | None:
        """The draft that stands for a sample; None if it cannot be used."""
        chosen = self._chosen[source]
        key = source, chosen[index * len(chosen) // self.counts[source]]
        if key not in self._known:
            beat("counting the steps of the epochs")
            found = self._dataset.draft(*key)
            self._known[key] = found if isinstance(found, Draft) else None
        return self._known[key]
