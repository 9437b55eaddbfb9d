"""Processes that make rows: they end with the trainer, not with a signal that all processes of a job receive."""

import gc
import os
import signal
import threading

import torch
from torch.utils.data import DataLoader, IterableDataset

from megavlm.base.processes import end_with_parent


def in_workers(
    dataset: IterableDataset, num_workers: int, *, ahead: int | None = None, pin_memory: bool = False
) -> DataLoader:
    """A loader of the items of ``dataset``, which ``num_workers`` forked processes make (0: this process).

    Args:
        dataset: each worker iterates over it and finds its number with ``torch.utils.data.get_worker_info``.
        num_workers: number of processes.
        ahead: number of items that a worker makes in advance; None: torch's default.
        pin_memory: whether items are put into page-locked memory, for training on a GPU.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Other ways of starting a process import torch and transformers again, which takes a worker many seconds.
        multiprocessing_context="fork" if num_workers else None,
        # Not the global generator: only ranks that load data draw here, and they draw once more after a resume,
        # so the random numbers of dropout would differ between ranks.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    """Set up a new worker process.

    When a job is stopped, all its processes receive a signal. The worker ignores it, because the trainer still needs
    rows until its step is done. A worker ends only if the trainer itself sends the signal, or dies.
    """
    end_with_parent()
    gc.freeze()  # this process must not collect objects inherited from the trainer, such as tensors on the GPU
    for stop in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
