"""Rows for training: endless, shuffled, blended, packed in worker processes, and resumable to the sample."""

import gc
import hashlib
import os
import pickle
import signal
import threading
from collections.abc import Generator
from typing import Any

from megatron.energon import SavableDataLoader, WorkerConfig
from megatron.energon.savable_loader import SavableDataLoaderState
from megatron.energon.wrappers import BlendDataset

from megavlm.config.errors import UserError
from megavlm.data.jsonl import JsonlFile
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.sources import DraftDataset, ErrorsAsItems, RowDataset
from megavlm.processes import end_with_parent

_PREFETCH = 2  # rows that each worker makes ahead


class RowLoader:
    """Iterates over rows without end. Made by ``build_loader``.

    ``state_dict()`` holds the place of every worker of this rank behind the rows taken so far, and what waits in their
    packing buffers (as line numbers, not as data); a loader built from the same settings and given that state by
    ``load_state_dict`` before its first row continues with the very row that would have come next.

    Rank r takes rows from its workers in turn; worker w of it is number r + ranks × w of all. So row n of all ranks
    together comes from worker n modulo their number, on whichever rank that worker lies: given the states of all
    workers, another number of ranks with as many workers in all continues the same sequence of rows.
    """

    def __init__(self, loader: SavableDataLoader, identity: dict[str, Any]):
        self._loader = loader
        self._identity = identity
        self._rows: Generator[Row | UserError] | None = None
        self._taken = 0  # rows, by this rank

    def __iter__(self) -> "RowLoader":
        return self

    def __next__(self) -> Row:
        """The next row. Raises UserError, naming file and line, for a sample that cannot be used."""
        if self._rows is None:
            self._rows = iter(self._loader)
        row = next(self._rows)
        if isinstance(row, UserError):
            raise row
        self._taken += 1
        return row

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each worker of this rank, for a checkpoint: strings, numbers and bytes."""
        rank, workers = self._loader.save_state_rank(), max(self._loader.num_workers, 1)
        states = [None] * workers if rank is None else rank.worker_states  # None: not started yet
        rows = self._taken * self._loader.worker_config.world_size
        return [{"identity": self._identity, "rows": rows, "state": pickle.dumps(state)} for state in states]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of this rank's workers, in their order.

        Raises UserError if they are of other data, or of another number of workers in all.
        """
        for name, value in self._identity.items():
            if states[0]["identity"].get(name) != value:
                raise UserError(
                    f"the checkpoint was written with {name} {states[0]['identity'].get(name)}, now it is {value}: "
                    "the data cannot be continued from its place",
                    "resume with the settings of the interrupted run, or start a new run from its weights (model.load)",
                )
        self._taken, rest = divmod(states[0]["rows"], self._loader.worker_config.world_size)
        assert rest == 0, states[0]["rows"]  # every step takes as many rows on each rank
        workers = [pickle.loads(state["state"]) for state in states]
        if workers[0] is not None:
            turn = self._taken % len(workers)
            self._loader.restore_state_rank(
                SavableDataLoaderState(worker_states=workers, next_worker_id=turn, micro_batch_size=None)
            )

    def close(self) -> None:
        """End the worker processes; the loader cannot be used any more."""
        if self._rows is None:
            return
        self._rows.close()
        has_workers, self._rows, self._loader = self._loader.num_workers > 0, None, None
        if has_workers:
            gc.collect()  # torch's loader and its iterator hold each other; the workers end with them


def build_loader(
    settings: Any,
    renderer: Renderer,
    kind: Kind,
    *,
    dp_rank: int,
    dp_size: int,
    seed: int,
    pin_memory: bool = False,
) -> RowLoader:
    """The training rows of one data-parallel rank.

    Args:
        settings: the ``data`` section: train, packing, packing_buffer, shuffle, workers, seq_length.
        renderer: of the model's folder, with the same settings.
        kind: "tune" or "pretrain".
        dp_rank: this data-parallel rank of `dp_size`; call it on one process of each model-parallel group.
        dp_size: data-parallel ranks.
        seed: of sample order and blending.
        pin_memory: hand rows over in page-locked memory, for training on a GPU.

    Raises:
        UserError: no sources, or a source that is missing or empty.
    """
    if not settings.train:
        raise UserError("data.train names no data", "name a file: data.train: [{path: …}]")
    workers = WorkerConfig(rank=dp_rank, world_size=dp_size, num_workers=settings.workers, seed_offset=seed)
    files = [JsonlFile(source.path) for source in settings.train]
    drafts = [
        DraftDataset(
            file,
            renderer,
            kind,
            key=_key(seed, number) if settings.shuffle else None,
            worker_config=workers,
        )
        for number, file in enumerate(files)
    ]
    if len(drafts) == 1:
        samples = drafts[0]
    else:
        weights = [source.weight for source in settings.train]
        samples = BlendDataset(*zip(drafts, weights, strict=True), worker_config=workers)
    rows = RowDataset(samples, renderer, settings.packing_buffer if settings.packing == "best_fit" else 1)
    loader = SavableDataLoader(
        ErrorsAsItems(rows, worker_config=workers),
        # A state after every row, so that continuing renders nothing twice.
        checkpoint_every_sec=0,
        checkpoint_every_min_n_samples=1,
        prefetch_factor=_PREFETCH,
        gc_collect_every_n_steps=0,
        watchdog_timeout_seconds=None,
    )
    loader.pin_memory = pin_memory  # energon always wants it, and torch warns of that where there is no GPU
    loader.worker_init_fn = _start_worker
    identity = {
        "data workers in all": [dp_size * max(settings.workers, 1), settings.workers > 0],
        "data.train": [[file.path.name, len(file), s.weight] for file, s in zip(files, settings.train, strict=True)],
        "data.seq_length": renderer.seq_length,
        "data.packing": [settings.packing, rows.buffer_size],
        "data.shuffle": settings.shuffle,
        "train.seed": seed,
    }
    return RowLoader(loader, identity)


def _start_worker(worker: int) -> None:
    """In a new worker process, instead of energon's own start, which walks over (and so copies) the trainer's heap.

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


def _key(seed: int, source: int) -> int:
    """Orders differ between seeds and between the sources of one blend; epochs count up from here."""
    return int.from_bytes(hashlib.sha256(f"{seed},{source}".encode()).digest()[:6])
