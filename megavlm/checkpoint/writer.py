"""Writes sharded state into a torch_dist folder, optionally in the background while training continues.

Megatron plans which rank writes what, once for all saves of the same shape. Its own background writer is not used: it
first copies everything, it starts a helper by spawn, which takes seconds and outlives a killed trainer, and it loses
the reason of a failure. Here, a forked child writes. It sees the memory as it was at the fork, so tensors in host
memory are not copied. It ends with its parent, and it sends its results, or the exception, through a pipe.
"""

import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat, while_bytes_flow
from megavlm.base.processes import end_with_parent
from megavlm.platform.collectives import gather_objects, on_first_rank

Results = list[WriteResult] | Exception
"""Torch's write results of one rank, or the error that prevented them."""


class WriteError(UserError):
    """A checkpoint could not be written. Older checkpoints of the run are unchanged."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    folder: Path
    files: "_Files"
    metadata: Metadata | None  # on the first rank
    child: "_Child | None"  # the process that writes; None if this process has written
    results: Results | None  # of this rank, if this process has written
    everyone: list[tuple[int, Results]] | None = None  # when all ranks have written: (bytes, results) of each rank
    sealing: Future[None] | None = None  # on the first rank, after that


@dataclass
class _Child:
    """A process that writes, and the connection that its results arrive on."""

    process: ForkProcess
    connection: Connection


class CheckpointWriter:
    """Writes checkpoints, one at a time. Planning is repeated only if the shape of the state changes.

    Args:
        replicas: ranks that have copies of the same state and divide the writing among themselves.
        host: a group of all ranks on the host network.
        background: whether to write in a forked child.
    """

    def __init__(self, replicas: dist.ProcessGroup, host: dist.ProcessGroup, *, background: bool):
        self._host, self._background, self._replicas = host, background, replicas
        self._shape: object = None
        self._forget_plan()
        self._metadata: Metadata | None = None
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # on rank 0, it waits for the disk

    def _forget_plan(self) -> None:
        self._sharing = None
        if self._replicas.size() > 1:
            self._sharing = FullyParallelSaveStrategyWrapper(None, self._replicas, do_cache_distribution=True)
        self._plans = (None, None, False)  # Megatron's central plan and local plan, and whether all ranks may use them

    def start(self, state: dict, folder: Path, shape: object = None) -> None:
        """Starts to write ``state`` into ``folder``, and returns as soon as the tensors may change.

        Call it on all ranks, after the previous checkpoint is finished.

        Args:
            state: the sharded state.
            folder: the folder, which is created.
            shape: a value that is equal for states with the same keys and shapes, and the same on all ranks. The plan
                is made again if it changes.

        Raises:
            WriteError: on all ranks, if the folder cannot be created.
        """
        assert self._pending is None
        if shape != self._shape:
            self._shape = shape
            self._forget_plan()
        self._on_first_rank(folder, partial(folder.mkdir, parents=True))
        files, metadata = self._plan(state, folder)
        child = results = None
        if self._background:
            connection, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(
                target=_write_in_child, args=(files, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            child = _Child(process, connection)
        else:
            with while_bytes_flow("writing a checkpoint"):
                results = files.write()
        self._pending = _Pending(folder, files, metadata, child, results)

    def finish(self, seal: Callable[[Path], None], *, wait: bool) -> None:
        """Completes the checkpoint that is being written, if all ranks have written. Call it on all ranks.

        Args:
            seal: called on rank 0, in a thread, with the folder, when everything is on disk.
            wait: whether to wait until all ranks have written and the checkpoint is complete.

        Raises:
            WriteError: on all ranks, if any rank could not write; the folder is removed.
        """
        pending, first = self._pending, dist.get_rank() == 0
        if pending is None:
            return
        if pending.everyone is None:
            if not wait and self._is_true_anywhere(pending.child is not None and not pending.child.connection.poll()):
                return
            with while_bytes_flow("writing a checkpoint", pending.child.process.pid if pending.child else None):
                mine = (pending.files.num_bytes, _results_of(pending))
            pending.everyone = gather_objects(mine, self._host)
            if first:
                pending.sealing = self._thread.submit(_complete, pending, pending.everyone, seal)
        sealing = pending.sealing
        if not wait and self._is_true_anywhere(sealing is not None and not sealing.done()):
            return
        self._pending = None
        self._on_first_rank(pending.folder, lambda: sealing and sealing.result(), pending.everyone)

    def _is_true_anywhere(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, group=self._host)
        return bool(flags.item())

    def _plan(self, state: dict, folder: Path) -> tuple["_Files", Metadata | None]:
        shards, common = save_preprocess(state, validate_access_integrity=self._plans[0] is None)
        shards["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank())
        if self._sharing is not None:
            self._sharing.apply_saving_parallelization(shards)
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, True)
        files = _Files(folder)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(shards, False),
            files,
            self._host,
            planner=planner,
            cached_ckpt_structure=self._plans,
        )
        (_, metadata, _), *plans, _ = planned
        self._plans = tuple(plans)
        self._metadata = metadata or self._metadata
        return files, self._metadata

    def _on_first_rank(
        self, folder: Path, call: Callable[[], object], everyone: list[tuple[int, Results]] | None = None
    ) -> None:
        """Runs ``call`` on rank 0; its OSError becomes a WriteError on all ranks. Any error removes the folder."""

        def guarded() -> None:
            try:
                call()
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                needed = sum(size for size, _ in everyone) if everyone else None
                raise WriteError(*_explain(folder, error, needed)) from error
            except Exception as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise RuntimeError(f"the checkpoint {folder} could not be written: {error!r}") from error

        on_first_rank(guarded, self._host)


class _Files(FileSystemWriterAsync):
    """Writes one file for this rank. Tensors in host memory are not copied."""

    num_bytes = 0

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        data = [(item, planner.resolve_data(item)) for item in plan.items]
        others = [(item, value) for item, value in data if not isinstance(value, Tensor)]
        tensors = [(item, value.detach()) for item, value in data if isinstance(value, Tensor)]
        self.num_bytes = sum(value.nbytes for _, value in tensors) + sum(
            value.getbuffer().nbytes for _, value in others
        )
        if data:
            name = f"{plan.storage_data.prefix}0.distcp"
            self.write_buckets = self.preload_tensors(
                [(os.path.join(self.checkpoint_dir, name), name, (others, tensors))]
            )
        else:
            self.write_buckets = []

    def write(self) -> Results:
        """Writes the file. Returns torch's write results, or the error."""
        if not self.write_buckets:
            return []
        ((file, name, (others, tensors)),) = self.write_buckets
        own = ((item, _own_storage(tensor)) for item, tensor in tensors)  # one at a time
        _, results = self.write_preloaded_data(
            [self.transforms], 0, (file, name, (others, own)), None, None, use_fsync=True
        )
        if isinstance(results, Exception):
            cause: BaseException = results
            while not isinstance(cause, OSError) and cause.__context__ is not None:
                cause = cause.__context__  # torch reports a full disk as "unexpected pos"
            results = cause if isinstance(cause, OSError) else RuntimeError(f"{type(results).__name__}: {results}")
        return results


def _own_storage(tensor: Tensor) -> Tensor:
    """Returns a tensor with a storage of its own, because ``torch.save`` writes the whole storage of a tensor."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_in_child(files: _Files, connection: Connection, parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    gc.disable()
    torch.set_num_threads(1)  # the thread pool does not exist after the fork, and a parallel copy would wait forever
    connection.send(files.write())
    os._exit(0)  # without the exit handlers that the trainer has registered


def _results_of(pending: _Pending) -> Results:
    """Waits for this rank's results."""
    if pending.child is None:
        assert pending.results is not None, "without a child, this process has written"
        return pending.results
    process, connection = pending.child.process, pending.child.connection
    results: Results
    try:
        results = connection.recv()
    except (EOFError, OSError):  # the latter in the middle of a message
        process.join()
        results = OSError(f"the writing process ended with exit status {process.exitcode}")
    connection.close()
    return results  # without waiting for the child: releasing its memory takes longer than everything here


def _complete(pending: _Pending, everyone: list[tuple[int, Results]], seal: Callable[[Path], None]) -> None:
    """Makes the written files a checkpoint; for the first rank."""
    failed = [results for _, results in everyone if isinstance(results, Exception)]
    if failed:
        raise failed[0]
    pending.files.finish(pending.metadata, [results for _, results in everyone])
    save_config(CheckpointingConfig(TorchDistSaveShardedStrategy().backend, 1), str(pending.folder))
    beat(f"writing {pending.folder}")
    seal(pending.folder)  # also deletes older checkpoints
    beat(f"publishing {pending.folder}")


def _explain(folder: Path, error: OSError, needed: int | None) -> tuple[str, str]:
    where = folder.parent
    while not where.exists():
        where = where.parent
    room = f"{shutil.disk_usage(where).free / 1e9:.3g} GB are free there"
    if needed is not None:
        room = f"it needs {needed / 1e9:.3g} GB, {room}"
    message = f"cannot write the checkpoint {folder}: {error.strerror or error}; {room}"
    remedy = (
        "free some space, or lower checkpoint.keep, and start the same command again: it continues from the newest "
        "checkpoint"
    )
    return message, remedy
