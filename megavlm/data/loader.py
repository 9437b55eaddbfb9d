"""The stream of training rows: blended, shuffled, packed in worker processes, and resumable exactly."""

import gc
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSettings
from megavlm.data.expected_steps import expected_steps
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.row_plan import RowPlan
from megavlm.data.rows import RowDataset
from megavlm.data.sample_order import reshard
from megavlm.records.records import Kind
from megavlm.records.skipped_samples import SkippedSample
from megavlm.sources.blend import Source, open_sources, samples_of_epochs
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import rows_from_workers

_BLEND = "data.train and data.replay"
_MOST_AHEAD = 16  # maximum rows that a worker prepares in advance; rows are large because they contain pixels

Place = tuple[int, dict[int, dict]]
"""Where the rows of a rank end: their number, and the states of its workers."""


class RowLoader:
    """An iterator over rows that has no end (after the last epoch they are empty). Built by ``build_loader``.

    ``state_dict()`` contains the state of each worker of this rank after the rows taken so far, including the samples
    in its packing buffer (as sample numbers, not as data). If a loader is built from the same settings and receives
    that state through ``load_state_dict`` before its first row, it continues with exactly the row that would have come
    next.

    Rank r takes rows from its workers in turn; its worker w has the global number r + ranks × w. Row n over all ranks
    therefore comes from worker n modulo the total number of workers, regardless of the rank that runs this worker. So
    a different number of ranks with the same total number of workers continues the same sequence of rows from the
    states of all workers.
    """

    def __init__(self, dataset: RowDataset, num_workers: int, rows_per_step: int, identity: dict):
        ahead = min(max(2, -(-rows_per_step // max(num_workers, 1))), _MOST_AHEAD)
        self._dataset, self._identity = dataset, identity
        self._begin = partial(rows_from_workers, dataset, num_workers, ahead=ahead)
        self._rows: Generator[Row] | None = None
        self._is_closed = False
        self._taken = 0
        self._plan = dataset.plan
        self._before = 0  # rows of all ranks before the number of workers or the blend changed
        self._notes_steps = True
        self._at_step: Place = (0, {})  # when the step began
        self._held: Place | None = None

    def __iter__(self) -> "RowLoader":
        return self

    def __next__(self) -> Row:
        """The next row.

        A sample that kills its worker is passed over (see ``rows_from_workers``).

        Raises UserError if a source has no usable samples, so that no further row can be made, or if workers die again
        and again.
        """
        if self._notes_steps and (self._rows is None or self._plan.place(self.next_number(0))[1] == 0):
            self._note_state()
        if self._rows is None:
            assert not self._is_closed, "the loader is closed"
            self._rows = self._begin()
        row = next(self._rows)
        self._taken += 1
        return row

    def next_number(self, rank: int) -> int:
        """The number of this rank's next row among all rows of the run, from 0; no two rows have the same."""
        return self._before + self._taken * self._dataset.workers.step + rank

    def begin_step(self) -> None:
        """Says that a step begins now, for a caller whose steps take different numbers of rows."""
        self._notes_steps = False
        self._note_state()

    def _note_state(self) -> None:
        """Notes the state to which ``rewind`` goes back."""
        self._at_step = self._counted

    @property
    def place(self) -> Place:
        """Where the rows taken so far end."""
        return self._taken, dict(self._dataset.loader_states)

    def hold(self, place: Place) -> None:
        """From now on, checkpoints and counts are those of ``place``, although more rows were taken ahead of time."""
        self._held = place

    @property
    def _counted(self) -> Place:
        """Where the rows end that checkpoints and counts know of."""
        return self._held or self.place

    @property
    def sources(self) -> list[Source]:
        return self._dataset.sources

    @property
    def ends(self) -> list[int] | None:
        """For each source, how many samples are read until the last epoch ends; None: there is no end."""
        return self._dataset.ends

    @property
    def epoch(self) -> int:
        """How many samples are read in one pass over the training data."""
        return sum(samples_of_epochs(self.sources, 1.0))

    def expected_steps(self) -> tuple[int, bool]:
        """The number of steps until the last epoch ends, and whether it is exact (see ``expected_steps``)."""
        return expected_steps(self._dataset)

    @property
    def fatal(self) -> FatalSamples:
        """The samples that have killed the process that read them."""
        return self._dataset.fatal

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each worker of this rank, for a checkpoint; it contains only strings, numbers and containers."""
        ranks, (taken, states) = self._dataset.workers.step, self._counted
        return [
            {
                "identity": self._identity,
                "rows": taken * ranks,
                "before": self._before,
                "place": states.get(worker),
            }
            for worker in self._dataset.workers
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> str | None:
        """Continue from the states of all workers of all ranks, ordered by worker number.

        Returns:
            None if the rows are the same as without an interruption. If the total number of workers or the shares of
            the sources have changed, a text that says what differs.

        Raises:
            UserError: the states belong to different data or settings.
        """
        saved = states[0]["identity"]
        for state in states:  # of a checkpoint that was written before sources could be added, or be limited
            if state["place"] is not None:
                state["place"]["draws"].setdefault("keys", list(range(len(saved[_BLEND]))))
                state["place"]["draws"].setdefault("tokens", [0] * len(saved[_BLEND]))
        numbers: list[int] | None = None
        for name, value in self._identity.items():
            if name == _BLEND:
                numbers = _numbers([source[:2] for source in saved.get(name, ())], [source[:2] for source in value])
                is_same = numbers is not None
            else:
                is_same = saved.get(name) == value
            if not is_same:
                raise UserError(
                    f"the checkpoint was written with {name} {saved.get(name)}, but it is now {value}: "
                    "the data cannot continue from its saved position",
                    "resume with the settings of the interrupted run, or start a new run from its weights (model.load)",
                )
        dataset = self._dataset
        is_new_blend = saved[_BLEND] != self._identity[_BLEND]
        if len(states) == dataset.num_workers and not is_new_blend:
            self._taken, rest = divmod(states[0]["rows"], dataset.workers.step)
            assert rest == 0, states[0]["rows"]  # every step takes as many rows on each rank
            dataset.loader_states = {w: states[w]["place"] for w in dataset.workers if states[w]["place"] is not None}
            dataset.turn = self._taken % len(dataset.workers)
            self._before = states[0].get("before", 0)
            return None
        self._before = states[0]["rows"] + states[0].get("before", 0)
        before = [
            dataset.initial_state(number)
            if state["place"] is None
            else _with_sources(state["place"], numbers or [], len(dataset.sources))
            for number, state in enumerate(states)
        ]
        drawn = [(state["draws"], old["place"] is None) for state, old in zip(before, states, strict=True)]
        keys = next((draws["keys"] for draws, is_new in drawn if not is_new), before[0]["draws"]["keys"])
        orders = reshard([draws | {"keys": keys} for draws, _ in drawn], dataset.num_workers)
        waiting = [sample for state in before for sample in state["waiting"]]
        wanted = max(state["wanted"] for state in before)
        dataset.loader_states = {
            w: {
                "worker": w,
                "draws": orders[w],
                "waiting": waiting[w :: dataset.num_workers],
                "wanted": wanted,
                "row": self._before + w,
            }
            for w in dataset.workers
        }
        what = f"the total number of data workers changed from {len(states)} to {dataset.num_workers}"
        if is_new_blend:  # counting begins again, so that the new shares hold from here on, not for the run as a whole
            what = "the shares of the data sources changed, or their limits"
            if len(saved[_BLEND]) != len(self._identity[_BLEND]):
                what = "data sources were added, which changes the shares"
        return (
            f"{what}: the order of samples differs from here on, but no sample is repeated or left out (the "
            f"{len(waiting)} samples in the packing buffers are kept)"
        )

    def rewind(self) -> None:
        """Sets the state back to the beginning of a step for which not all rows could be made; none can be taken then.

        The checkpoint of the step before can then be written on all ranks, of which some have taken their rows.
        """
        self._taken, self._dataset.loader_states = self._at_step
        self._held = None

    @property
    def drawn(self) -> list[tuple[int, int]]:
        """For each source, how many samples the rows taken so far have used up, and how many distinct ones were read.

        Counted over this rank's workers, from the first start of the run on. A sample that was skipped is used up; one
        that waits in a packing buffer has been read. Samples are counted as distinct in the first epoch of their source
        alone, which needs no memory.
        """
        _, states = self._counted
        of_workers = [self._dataset.drawn(worker, states) for worker in self._dataset.workers]
        return [(sum(used for used, _ in pair), sum(new for _, new in pair)) for pair in zip(*of_workers, strict=True)]

    @property
    def given(self) -> list[str]:
        """The names of the sources of which this rank's workers have given their share of ``max_tokens``."""
        if all(source.max_tokens is None for source in self.sources):
            return []
        of_workers = [self._dataset.has_given(worker, self._counted[1]) for worker in self._dataset.workers]
        return [source.name for source, *each in zip(self.sources, *of_workers, strict=True) if all(each)]

    def reread(self, source: int, index: int) -> SkippedSample | None:
        """Reads a sample of a source again in this process; None if it can be used, otherwise why it is skipped."""
        return self._dataset.reread(source, index)

    def close(self) -> None:
        """End the worker processes. The loader cannot be used afterwards."""
        if self._rows is not None:
            self._rows.close()
        self._rows, self._is_closed = None, True
        self._dataset.fatal.notes.close()
        gc.collect()  # torch's loader and its iterator reference each other; freeing them ends the workers


def build_loader(
    settings: DataSettings,
    renderer: Renderer,
    kind: Kind,
    *,
    dp_rank: int,
    dp_size: int,
    seed: int,
    rows_per_step: int = 1,
    output: Path | None = None,
    plan: RowPlan | None = None,
) -> RowLoader:
    """The loader of the training rows of one data-parallel rank. Call it on one process of each model-parallel group.

    Args:
        settings: the ``data`` section.
        renderer: the renderer of the model's folder, built with the same settings.
        kind: what is trained on, such as "tune" or "pretrain".
        dp_rank: this data-parallel rank.
        dp_size: the number of data-parallel ranks.
        seed: the seed of sample order and blending.
        rows_per_step: rows that this rank takes per training step; the workers prepare about as many in advance.
        output: the run's folder, which keeps the list of samples that have killed the process that read them.
        plan: see ``RowDataset``; None: each step has as many rows.

    Raises:
        UserError: there are no sources, or a source is missing or empty.
    """
    sources = open_sources(settings)
    dataset = RowDataset(
        sources,
        renderer,
        kind,
        buffer_size=settings.packing_buffer if settings.packing == "best_fit" else 1,
        max_patches=settings.max_patches_per_row,
        seed=seed if settings.shuffle else None,
        first_worker=dp_rank,
        stride=dp_size,
        num_workers=dp_size * max(settings.workers, 1),
        fatal=FatalSamples(sources, settings.workers, output, dp_rank),
        plan=plan or RowPlan(rows=rows_per_step * dp_size),
    )
    identity = {
        _BLEND: [
            [s.file.path.rpartition("/")[2], len(s.file), round(s.share, 6), *filter(None, [s.max_tokens])]
            for s in sources
        ],
        "data.seq_length": renderer.seq_length,
        "data.packing": [settings.packing, dataset.buffer_size],
        "data.shuffle": settings.shuffle,
        "train.seed": seed,
    }
    return RowLoader(dataset, settings.workers, rows_per_step, identity)


def _numbers(saved: list, now: list) -> list[int] | None:
    """For each source of a checkpoint its number among the sources now; None if one is missing or the order differs."""
    numbers: list[int] = []
    for source in saved:
        first = numbers[-1] + 1 if numbers else 0
        if source not in now[first:]:
            return None
        numbers.append(now.index(source, first))
    return numbers if numbers else None


def _with_sources(place: dict, numbers: list[int], count: int) -> dict:
    """The state of a worker among `count` sources, of which it knew those with these numbers; others are new."""
    places = {number: old for old, number in enumerate(numbers)}
    keys = iter(range(max(place["draws"]["keys"]) + 1, 2 * count))
    new: dict[str, Callable] = {"taken": int, "base": int, "ahead": list, "tokens": int, "keys": keys.__next__}
    draws = {
        name: [values[places[n]] if n in places else new[name]() for n in range(count)]
        for name, values in place["draws"].items()
    }
    return place | {"draws": draws, "waiting": [(numbers[source], *rest) for source, *rest in place["waiting"]]}
