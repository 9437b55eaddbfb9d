"""Checkpoints of a run: everything that continuing on the same bits needs, in Megatron's torch_dist format.

A checkpoint is a folder ``step_00000100`` with weights and optimizer state by global name and shape (any parallel
layout loads them), the random state of every rank and the place in the data of every data rank. It is written as
``step_00000100.partial`` and renamed when every rank has written its share: what bears the final name is complete.
"""

import logging
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megavlm.config.errors import UserError
from megavlm.convert import HF_LAYOUT, SHARDED_METADATA
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

_log = logging.getLogger(__name__)
# Said once on every rank: to prefer nvidia-resiliency-ext, which exists for CUDA alone.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").addFilter(
    lambda record: "async save is deprecated" not in record.getMessage()
)
_NAME = re.compile(r"step_(\d+)")


def latest(root: Path) -> Path | None:
    """The newest readable checkpoint in ``root``; None if there is none. Names those it passes over in warnings."""
    for _, folder in reversed(_published(root)):
        try:
            McoreCheckpoint(folder).check_files()
            return folder
        except UserError as error:
            _log.warning("passed over: %s", error.message)
    return None


class Checkpoints:
    """Writes the checkpoints of one run and continues from one.

    Args:
        root: folder of the checkpoints.
        vlm: the model. optimization: its optimizers and schedule. loader: its rows, None where this rank reads none.
        settings: the ``checkpoint`` section (keep, async_save). train: the ``train`` section.
        origin: checkpoint the run's weights came from, whose note on the Hugging Face files is handed on.
    """

    def __init__(self, root: Path, vlm, optimization, loader, settings, train, origin: Path | None = None):
        self.root, self.vlm, self.optimization, self.loader, self.settings = root, vlm, optimization, loader, settings
        self._identity = {
            "train.optimizer": train.optimizer,
            "train.precision": train.precision,
            "learning parts": sorted(optimization.ddp),
            "data-parallel ranks": vlm.groups.data_size,
        }
        self._world = vlm.groups.world_host
        self._hf_layout = _read_text(origin / HF_LAYOUT) if origin else None
        self._queue = AsyncCallsQueue() if settings.async_save else None

    def save(self, step: int) -> None:
        """Write the state after ``step``. With ``async_save`` it returns once the state is copied to host memory.

        One checkpoint is in the making at a time: this waits for the one before. Call it on all ranks.
        """
        self.finish()
        folder = self.root / f"step_{step:08}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            folder.mkdir(parents=True)
        dist.barrier(self._world)
        strategy = TorchDistSaveShardedStrategy()
        replicas = self.vlm.groups.language.dp_cp
        if replicas.size() > 1:  # every data rank writes a part of what they all hold
            strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
        state = {
            **self._sharded(loading=False),
            "step": step,
            "schedule": self.optimization.scheduler.num_steps,
            "identity": self._identity,
            "world_size": dist.get_world_size(),
        }
        request = dist_checkpointing.save(
            state, str(folder), strategy, async_sharded_save=self._queue is not None, async_strategy="mcore"
        )
        if request is None:
            self._publish(folder)
        else:
            request.add_finalize_fn(partial(self._publish, folder))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish a checkpoint whose background writing has ended; costs nothing if none is being written.

        Call it on all ranks, after each step.
        """
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait until everything is on disk and published. Call it on all ranks."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def restore(self, folder: Path) -> int:
        """Take over the state in ``folder``; returns the number of steps done.

        Weights and optimizer state load in any layout; the place in the data needs the same number of data-parallel
        ranks; random states are taken over if the world has as many ranks as then.

        Raises:
            UserError: the run was of another optimizer, precision, set of learning parts or data layout.
        """
        common = dist_checkpointing.load_common_state_dict(str(folder))
        for name, value in self._identity.items():
            if "identity" in common and common["identity"][name] != value:
                raise UserError(
                    f"{folder} was written with {name} {common['identity'][name]}, now it is {value}",
                    "resume with the settings of the interrupted run, or start a new run from it (model.load)",
                )
        _allocate(self.optimization.optimizer)
        wanted = self._sharded(loading=True)
        if common["world_size"] != dist.get_world_size():
            del wanted["rng"]
        state = dist_checkpointing.load(wanted, str(folder))
        self.vlm.load_sharded(state["model"])
        _load_optimizer(self.optimization.optimizer, state["optimizer"])
        scheduler = self.optimization.scheduler
        scheduler.step(increment=state["schedule"] - scheduler.num_steps)  # the curve itself follows the settings
        if self.loader is not None:
            self.loader.load_state_dict(state["data"])
        if "rng" in state:
            set_random_state(state["rng"])
        self._hf_layout = _read_text(folder / HF_LAYOUT)
        return state["step"]

    def _sharded(self, *, loading: bool) -> dict:
        metadata, groups = dict(SHARDED_METADATA), self.vlm.groups
        model = self.vlm.sharded_state_dict(metadata)
        optimizer = self.optimization.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        generators = None if loading else random_state()
        state = {
            "model": model,
            "optimizer": optimizer,
            "rng": ShardedObject("rng", generators, (dist.get_world_size(),), (dist.get_rank(),)),
        }
        if self.loader is not None:
            place = None if loading else self.loader.state_dict()
            state["data"] = ShardedObject("data", place, (groups.data_size,), (groups.data_rank,))
        return state

    def _publish(self, folder: Path) -> None:
        """Give the finished folder its name and delete what is no longer kept."""
        if dist.get_rank() == 0:
            if self._hf_layout:
                (folder / HF_LAYOUT).write_text(self._hf_layout, encoding="utf-8")
            final = folder.with_suffix("")
            if final.exists():  # an unreadable one, that the run had to pass over when it resumed
                shutil.rmtree(final)
            folder.rename(final)
            step = int(_NAME.fullmatch(final.name)[1])
            older = [path for number, path in _published(self.root) if number <= step]
            newer = [path for number, path in _published(self.root) if number > step]  # unreadable too
            stale = [path for path in self.root.glob("step_*.partial") if path != folder]
            for path in older[: -self.settings.keep] + newer + stale:
                shutil.rmtree(path)
        dist.barrier(self._world)


def _published(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in ``root`` that bears a final name, by step."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name)) and path.is_dir())


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _uses_torch_adam(optimizer) -> bool:
    """Whether DistributedOptimizer stands on torch's Adam: where neither Transformer Engine nor Apex is installed."""
    return isinstance(optimizer, DistributedOptimizer) and isinstance(optimizer.optimizer, torch.optim.Adam)


def _allocate(chained: ChainedOptimizer) -> None:
    """Give torch Adams that have not stepped yet their state; ``DistributedOptimizer.state_dict`` asks for a step."""
    for adam in (optimizer.optimizer for optimizer in chained.chained_optimizers if _uses_torch_adam(optimizer)):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros(()), **moments}


def _load_optimizer(chained: ChainedOptimizer, state: dict) -> None:
    """``chained.load_state_dict(state)``, also for DistributedOptimizer over torch's Adam.

    That one looks for a stored tensor for each tensor of Adam's state, "step" too, which is stored as a number; and it
    gives all parameters one step tensor, which each of them would count up. So its moments are loaded while the steps
    are plain numbers, and each parameter gets its own afterwards.
    """
    optimizers = chained.chained_optimizers
    if not any(map(_uses_torch_adam, optimizers)):
        chained.load_state_dict(state)
        return
    states = [state] if len(optimizers) == 1 else [state[index] for index in range(len(optimizers))]
    for optimizer, part in zip(optimizers, states, strict=True):
        tensors = part.pop("param_state")
        optimizer.load_state_dict(part)
        values = optimizer.optimizer.state.values()
        for value in values:
            value["step"] = value["step"].item()
        optimizer.load_parameter_state_from_fully_reshardable(tensors)
        for value in values:
            value["step"] = torch.tensor(value["step"])


def random_state() -> dict:
    """State of every generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),  # the platform answers with torch's own where there is no GPU
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
