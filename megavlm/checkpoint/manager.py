"""Checkpoints of a run: everything that continuing on the same bits needs, in Megatron's torch_dist format.

A checkpoint is a folder ``step_00000100`` with weights and optimizer state by global name and shape (any parallel
layout loads them), the random state of every rank and the place in the data of every data worker. How folders come and
go is ``checkpoint_folders``' job, how they are written ``checkpoint_writer``'s.
"""

import logging
import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megavlm.adapters.attach import Adapters, learned
from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.folders import clean, partial_folder, publish
from megavlm.checkpoint.optimizer_state import load_state, saved_state, wanted_state
from megavlm.checkpoint.writer import CheckpointWriter
from megavlm.config.settings import Settings
from megavlm.convert import HF_LAYOUT, SHARDED_METADATA
from megavlm.convert.peft_config import ADAPTER_CONFIG, config_of, write_config
from megavlm.data.row_source import RowSource
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim.megatron_galore import check_layout, has_galore
from megavlm.optim.optimizers import Optimizers
from megavlm.platform.collectives import broadcast_object, on_first_rank

_log = logging.getLogger(__name__)


MAIN = "model"
"""Name of the model that a run is about; its weights lie in a checkpoint under their own keys, without a prefix."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, its optimizers and, where it has any, its adapters: what a checkpoint holds of it."""

    vlm: VLM
    optimizers: Optimizers
    adapters: Adapters | None = None


class Checkpoints:
    """Writes the checkpoints of one run and continues from one. Made on all ranks.

    Args:
        root: folder of the checkpoints.
        models: the models that are trained, by name. ``MAIN`` is one of them; the keys of every other one (a critic,
            for example) begin with its name in the checkpoint.
        rows: the run's rows, None where this rank reads none.
        settings: of the run; its checkpoint, train, data and parallel sections.
        origin: checkpoint that the main model's weights came from, whose note on the Hugging Face files is passed on.
    """

    def __init__(
        self,
        root: Path,
        models: Mapping[str, TrainedModel],
        rows: RowSource | None,
        settings: Settings,
        origin: Path | None = None,
    ):
        main = models[MAIN]
        self.root, self.models, self.rows = root, models, rows
        self.vlm, self.optimizers, self.adapters = main.vlm, main.optimizers, main.adapters
        self._others = {name: model for name, model in models.items() if name != MAIN}
        self.settings, self._hf = settings.checkpoint, settings.model.hf
        self._layout = {"world": dist.get_world_size(), **settings.parallel.model_dump()}
        self._pad_multiple = settings.pad_multiple
        adapters, world = self.adapters, self.vlm.groups.world_host
        base = None
        if adapters is not None and origin is not None:
            base = on_first_rank(partial(digest_of_folders, origin), world)
        self._identity = lambda step: {
            "adapter": adapters and config_of(adapters.settings, self.vlm.shapes),
            "base below the adapters": base,
            "train.optimizer": settings.train.optimizer,
            "train.precision": settings.train.precision,
            "learning parts": sorted(set(PARTS) - set(settings.frozen(step))),
            "other models": sorted(self._others) or None,
        }
        self._start = broadcast_object(secrets.token_hex(4), world)
        if dist.get_rank() == 0:
            clean(root)
        self._hf_layout = _read_text(origin / HF_LAYOUT) if origin else None
        self._writer = CheckpointWriter(
            self.vlm.groups.language.dp_cp, world, background=settings.checkpoint.async_save
        )
        self._seconds = 0.0

    def save(self, step: int) -> None:
        """Write the state after ``step``. With ``async_save`` it returns once the state may change.

        One checkpoint is in the making at a time: this waits for the one before. Call it on all ranks.

        Raises:
            WriteError: this one or the one before could not be written, on all ranks.
        """
        self.finish()
        began = time.perf_counter()
        state = {
            **self._sharded(loading=False),
            "step": step,
            "schedule": self.optimizers.scheduler.num_steps,
            "thawed_at": self.optimizers.unfrozen_at,
            "schedules": {name: model.optimizers.scheduler.num_steps for name, model in self._others.items()},
            "identity": self._identity(step),
            "layout": self._layout,
            "align": self._pad_multiple,
        }
        self._writer.start(state, partial_folder(self.root, step, self._start), sorted(self.optimizers.unfrozen_at))
        self._seconds += time.perf_counter() - began
        if not self.settings.async_save:
            self.finish()

    def poll(self) -> None:
        """Publish a checkpoint whose background writing has ended; costs nothing if none is being written.

        Call it on all ranks, after each step. Raises WriteError as ``save`` does.
        """
        self._finish(wait=False)

    def finish(self) -> None:
        """Wait until everything is on disk and published. Call it on all ranks. Raises WriteError as ``save`` does."""
        self._finish(wait=True)

    def take_seconds(self) -> float:
        """Seconds that this rank's training loop has waited here since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def restore(self, folder: Path) -> int:
        """Take over the state in ``folder``; returns the number of steps done.

        Weights, optimizer state and the place in the data load in any layout; random states are taken over in the same
        layout.

        Raises:
            UserError: the run was of another optimizer, precision or set of learning parts, or read other data; with
                GaLore also where its weights were cut in other pieces.
        """
        common = dist_checkpointing.load_common_state_dict(str(folder))
        if "workers" not in common:
            raise UserError(
                f"{folder} holds weights, but no run of this version", "start a new run from it (model.load)"
            )
        for name, value in self._identity(common["step"]).items():
            if common["identity"].get(name) != value:
                raise UserError(
                    f"{folder} was written with {name} {common['identity'].get(name)}, now it is {value}",
                    "resume with the settings of the interrupted run, or start a new run from it (model.load)",
                )
        if has_galore(self.optimizers):
            check_layout(common["layout"], self._layout)
        if common["align"] != self._pad_multiple:
            _log.warning(
                "samples were padded in their rows to a multiple of %d tokens, now of %d: rows are packed differently "
                "from here on, and no sample is lost; data.pad_multiple=%d keeps them where the layout allows it",
                common["align"], self._pad_multiple, common["align"],
            )  # fmt: skip
        self.optimizers.unfreeze(common["step"])
        wanted = self._sharded(loading=True)
        if self.rows is not None:
            count = common["workers"]
            wanted["data"] = [
                ShardedObject("data", None, (count,), (worker,), replica_id=self.vlm.groups.dp_rank)
                for worker in range(count)
            ]
        if common["layout"] != self._layout:
            del wanted["rng"]
        state = dist_checkpointing.load(wanted, str(folder))
        self.optimizers.unfrozen_at = dict(state.get("thawed_at", {}))
        for name, model in self.models.items():
            found = state if name == MAIN else state[name]
            model.vlm.load_sharded(found["model"])
            scheduler, done = model.optimizers.scheduler, state["schedule"]
            if name != MAIN:
                done = state["schedules"][name]
            scheduler.step(increment=done - scheduler.num_steps)  # the curve itself follows the settings
            load_state(model.optimizers, found["optimizer"])
        if self.rows is not None:
            different = self.rows.load_state_dict(state["data"])
            if different and self.vlm.groups.dp_rank == 0:
                _log.warning("%s", different)
        if "rng" in state:
            set_random_state(state["rng"])
        self._hf_layout = _read_text(folder / HF_LAYOUT)
        return state["step"]

    def _sharded(self, *, loading: bool) -> dict:
        groups, generators = self.vlm.groups, None if loading else random_state()
        state = {
            **_sharded_model(self.models[MAIN], loading=loading),
            "rng": ShardedObject("rng", generators, (dist.get_world_size(),), (dist.get_rank(),)),
        }
        for name, model in self._others.items():
            state[name] = _sharded_model(model, loading=loading)
            add_prefix_for_sharding(state[name], f"{name}.")
        if not loading:
            states = self.rows.state_dict() if self.rows is not None else []
            # worker w of data rank r is number r + ranks × w of all: rows come from them in that order
            count = groups.dp_size * len(states)
            state["workers"] = count  # the first rank's counts, which reads rows
            state["data"] = [
                ShardedObject("data", one, (count,), (groups.dp_rank + groups.dp_size * worker,))
                for worker, one in enumerate(states)
            ]
        return state

    def _finish(self, *, wait: bool) -> None:
        began = time.perf_counter()
        self._writer.finish(self._seal, wait=wait)
        self._seconds += time.perf_counter() - began

    def _seal(self, folder: Path) -> None:
        if self.adapters is not None:
            write_config(folder / ADAPTER_CONFIG, self.adapters.settings, self.vlm.shapes, str(self._hf))
        elif self._hf_layout:
            (folder / HF_LAYOUT).write_text(self._hf_layout, encoding="utf-8")
        publish(folder, self.settings.keep, self.settings.keep_every)


def _sharded_model(model: TrainedModel, *, loading: bool) -> dict:
    """The sharded state of a model and its optimizers: to be saved, or to be loaded into."""
    metadata = dict(SHARDED_METADATA)
    weights = model.vlm.sharded_state_dict(metadata)
    if model.adapters is not None:
        weights = learned(weights)
    state_of = wanted_state if loading else saved_state
    return {"model": weights, "optimizer": state_of(model.optimizers, weights, metadata)}


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


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
