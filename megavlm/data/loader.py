"""Rows for training: endless, shuffled, blended, packed in worker processes, and resumable to the sample."""

import gc
import os
import signal
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch.utils.data import DataLoader

from megavlm.base.errors import UserError
from megavlm.base.processes import end_with_parent
from megavlm.config.data_sections import DataSettings
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.rows import RowDataset
from megavlm.data.sample_order import reshard
from megavlm.data.sources import Source, open_sources

_MOST_AHEAD = 16  # rows that a worker makes before they are taken: pixels are large


class RowLoader:
    """Iterates over rows without end. Made by ``build_loader``.

    ``state_dict()`` holds the state of every worker of this rank after the rows taken so far, and what waits in their
    packing buffers (as line numbers, not as data); a loader built from the same settings and given that state by
    ``load_state_dict`` before its first row continues with the very row that would have come next.

    Rank r takes rows from its workers in turn; worker w of it is number r + ranks × w of all. So row n of all ranks
    together comes from worker n modulo their number, on whichever rank that worker lies: given the states of all
    workers, another number of ranks with as many workers in all continues the same sequence of rows.
    """

    def __init__(self, dataset: RowDataset, num_workers: int, rows_per_step: int, pin_memory: bool, identity: dict):
        ahead = min(max(2, -(-rows_per_step // max(num_workers, 1))), _MOST_AHEAD)
        self._dataset, self._identity = dataset, identity
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=ahead if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if num_workers else None,
            generator=torch.Generator(),  # not the one of dropout: leaders alone draw here, and once more when resuming
        )
        self._rows: Generator[Row | UserError] | None = None
        self._taken = 0  # rows, by this rank

    def __iter__(self) -> "RowLoader":
        return self

    def __next__(self) -> Row:
        """The next row. Raises UserError where none can come: a source none of whose samples can be used."""
        if self._rows is None:
            self._rows = iter(self._loader)
        row = next(self._rows)
        if isinstance(row, UserError):
            raise row
        self._taken += 1
        self._dataset.loader_states[row.loader_state["worker"]] = row.loader_state
        return row

    @property
    def sources(self) -> list[Source]:
        return self._dataset.sources

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each worker of this rank, for a checkpoint: strings, numbers, lists of them."""
        ranks, states = self._dataset.workers.step, self._dataset.loader_states
        return [
            {"identity": self._identity, "rows": self._taken * ranks, "place": states.get(worker)}
            for worker in self._dataset.workers
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> str | None:
        """Continue from the states of all workers of all ranks, in the order of their numbers.

        Returns:
            None where the same rows come as without an interruption; otherwise, where there are now more or fewer
            workers in all, what is different.

        Raises:
            UserError: they are of other data.
        """
        for name, value in self._identity.items():
            if states[0]["identity"].get(name) != value:
                raise UserError(
                    f"the checkpoint was written with {name} {states[0]['identity'].get(name)}, now it is {value}: "
                    "the data cannot be continued from where it was",
                    "resume with the settings of the interrupted run, or start a new run from its weights (model.load)",
                )
        dataset = self._dataset
        if len(states) == dataset.num_workers:
            self._taken, rest = divmod(states[0]["rows"], dataset.workers.step)
            assert rest == 0, states[0]["rows"]  # every step takes as many rows on each rank
            dataset.loader_states = {w: states[w]["place"] for w in dataset.workers if states[w]["place"] is not None}
            dataset.turn = self._taken % len(dataset.workers)
            return None
        before = [state["place"] or dataset.initial_state(number) for number, state in enumerate(states)]
        orders = reshard([state["draws"] for state in before], dataset.num_workers)
        waiting = [sample for state in before for sample in state["waiting"]]
        wanted = max(state["wanted"] for state in before)
        dataset.loader_states = {
            w: {"worker": w, "draws": orders[w], "waiting": waiting[w :: dataset.num_workers], "wanted": wanted}
            for w in dataset.workers
        }
        return (
            f"{dataset.num_workers} data workers in all continue the work of {len(states)}: samples come in another "
            f"order from here on; none is repeated or left out, the {len(waiting)} that waited to be packed included"
        )

    def close(self) -> None:
        """End the worker processes; the loader cannot be used any more."""
        self._rows = self._loader = None
        gc.collect()  # torch's loader and its iterator hold each other; the workers end with them


def build_loader(
    settings: DataSettings,
    renderer: Renderer,
    kind: Kind,
    *,
    dp_rank: int,
    dp_size: int,
    seed: int,
    rows_per_step: int = 1,
    pin_memory: bool = False,
) -> RowLoader:
    """The training rows of one data-parallel rank.

    Args:
        settings: the ``data`` section.
        renderer: of the model's folder, with the same settings.
        kind: "tune" or "pretrain".
        dp_rank: this data-parallel rank of `dp_size`; call it on one process of each model-parallel group.
        dp_size: data-parallel ranks.
        seed: of sample order and blending.
        rows_per_step: that this rank takes at a time: so many are made ahead.
        pin_memory: hand rows over in page-locked memory, for training on a GPU.

    Raises:
        UserError: no sources, or a source that is missing or empty.
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
    )
    identity = {
        "data.train and data.replay": [
            [s.file.path.rpartition("/")[2], len(s.file), round(s.share, 6)] for s in sources
        ],
        "data.seq_length": renderer.seq_length,
        "data.packing": [settings.packing, dataset.buffer_size],
        "data.shuffle": settings.shuffle,
        "train.seed": seed,
    }
    return RowLoader(dataset, settings.workers, rows_per_step, pin_memory, identity)


def _start_worker(worker: int) -> None:
    """In a new worker process.

    A signal to stop, sent to all processes of a job, is for the trainer to act on: it still needs rows until its step
    is done. Only the trainer itself ends a worker.
    """
    end_with_parent()
    gc.freeze()  # what the trainer left behind, tensors on the GPU among it, is not this process's to collect
    for stop in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
