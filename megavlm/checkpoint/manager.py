"""Checkpoints of a run: all state that is needed to resume it bit for bit, in Megatron's torch_dist format.

A checkpoint is a folder ``step_00000100`` with the trained weights and the optimizer state by global name and shape
(which any layout can load), the random state of every rank, and the position in the data of every data worker. The
module ``folders`` manages the folders, and the module ``writer`` writes them.
"""

import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megavlm.adapters.attach import Adapters, learned
from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.folders import clean, mend_best, partial_folder, publish
from megavlm.checkpoint.load_weights import load_checked
from megavlm.checkpoint.optimizer_state import load_state, saved_state, wanted_state
from megavlm.checkpoint.writer import CheckpointWriter
from megavlm.config.settings import Settings
from megavlm.convert import HF_LAYOUT, SHARDED_METADATA
from megavlm.convert.adapter import Adapter
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.hf_shapes import layout_of
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.peft_config import ADAPTER_CONFIG, config_of, write_config
from megavlm.data.row_source import RowSource
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim.megatron_galore import check_layout, has_galore
from megavlm.optim.optimizers import Optimizers
from megavlm.platform.collectives import broadcast_object, on_first_rank

_log = logging.getLogger(__name__)


# State of a run that all ranks share.
_COMMON_KEYS = {"step", "schedule", "identity", "layout", "align", "workers"}
MAIN = "model"
"""Name of the main model of a run. The keys of its weights in a checkpoint have no prefix."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, its optimizers, and its adapters if it has any: everything whose state a checkpoint contains.

    ``awake`` is the context within which the model is on the device, if it waits elsewhere.
    """

    vlm: VLM
    optimizers: Optimizers
    adapters: Adapters | None = None
    awake: Callable[[], AbstractContextManager] = nullcontext


class Checkpoints:
    """Writes the checkpoints of a run, and restores a run from a checkpoint. Create it on all ranks.

    Args:
        root: folder of the checkpoints.
        models: the trained models by name. ``MAIN`` is one of them. In the checkpoint, the keys of every other model (a
            critic, for example) begin with the model's name.
        rows: the source of the run's rows; None if this rank reads no rows.
        settings: the settings of the run (sections checkpoint, train, data, parallel and model).
        origin: the checkpoint or Hugging Face folder from which the main model's weights were loaded. The description
            of its Hugging Face files is copied into the new checkpoints.
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
            "vocabulary rows": self.vlm.shapes.text.vocab if settings.model.resize_vocabulary else None,
            "train.optimizer": settings.train.optimizer,
            "train.precision": settings.train.precision,
            "learning parts": sorted(set(PARTS) - set(settings.frozen(step))),
            "other models": sorted(self._others) or None,
        }
        self._start = broadcast_object(secrets.token_hex(4), world)
        if dist.get_rank() == 0:
            clean(root)
        self._hf_layout = _layout_in(origin) if origin else None
        self._writer = CheckpointWriter(
            self.vlm.groups.language.dp_cp, world, background=settings.checkpoint.async_save
        )
        self._seconds = 0.0
        self._best: int | None = None

    def link(self, best: int | None, last: int) -> tuple[int | None, list[str]]:
        """Links the checkpoint of the step with the best value of ``eval.best``. Call it on all ranks.

        Args:
            best: the step; None: what is linked stays.
            last: the step from which the run continues; what is linked of a later one is not any more.

        Returns:
            The step whose checkpoint is linked now, if any, and what the user should know of it.
        """
        return on_first_rank(partial(mend_best, self.root, best, last), self.vlm.groups.world_host)

    def save(self, step: int, *, best: int | None = None) -> None:
        """Writes the state after ``step``. With ``async_save``, it returns as soon as the state may change.

        It waits for the previous checkpoint, because only one checkpoint is written at a time. Call it on all ranks.
        ``best`` is the step with the best value of ``eval.best``, if there is one.

        Raises:
            WriteError: on all ranks, if this checkpoint or the previous one could not be written.
        """
        self.finish()
        self._best = best
        began = time.perf_counter()
        with self._awake():
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
            thawed = sorted(self.optimizers.unfrozen_at)
            self._writer.start(state, partial_folder(self.root, step, self._start), thawed)
        self._seconds += time.perf_counter() - began
        if not self.settings.async_save:
            self.finish()

    def poll(self) -> None:
        """Publishes the checkpoint that is being written in the background, if it is complete.

        Call it on all ranks after each step. It costs nothing if no checkpoint is being written. Raises WriteError as
        ``save`` does.
        """
        self._finish(wait=False)

    def finish(self) -> None:
        """Waits until everything is on disk and published. Call it on all ranks. Raises WriteError as ``save`` does."""
        self._finish(wait=True)

    def take_seconds(self) -> float:
        """Returns the seconds that this rank's training loop has spent on checkpoints since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _awake(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in self.models.values():
                model.optimizers.wait_for_weights()
                stack.enter_context(model.awake())
            yield

    def restore(self, folder: Path) -> int:
        """Restores the state in ``folder``. Returns the number of completed steps.

        Weights, optimizer state and the position in the data are restored in any layout; random states only in the
        layout that saved them.

        Raises:
            UserError: the checkpoint is damaged or contains something that Megatron must not unpickle; it is of another
                model, or was written with another optimizer, precision, adapter or set of trained parts, or with other
                data; with GaLore, also if the weights were divided into other pieces.
        """
        with self._awake():
            return self._restore(folder)

    def _restore(self, folder: Path) -> int:
        checkpoint, world = McoreCheckpoint(folder), self.vlm.groups.world_host
        on_first_rank(checkpoint.check_contents, world)
        common = checkpoint.common_state()
        if not common.keys() >= _COMMON_KEYS:
            raise UserError(
                f"{folder} contains weights, but not the state of a run of this version of megavlm",
                "start a new run from it (model.load)",
            )
        for name, value in self._identity(common["step"]).items():
            if common["identity"].get(name) != value:
                raise UserError(
                    f"{folder} was written with {name} = {common['identity'].get(name)}, but now it is {value}",
                    "resume with the settings of the interrupted run, or start a new run from it (model.load)",
                )
        on_first_rank(partial(self._check_weights, checkpoint), world)
        if has_galore(self.optimizers):
            check_layout(common["layout"], self._layout)
        if common["align"] != self._pad_multiple:
            _log.warning(
                "samples were padded to a multiple of %d tokens in their rows, and are now padded to a multiple of %d. "
                "Rows are packed differently from now on; no sample is lost. data.pad_multiple=%d keeps the rows "
                "unchanged if the layout allows it",
                common["align"], self._pad_multiple, common["align"],
            )  # fmt: skip
        self.optimizers.unfreeze(common["step"])
        wanted = self._sharded(loading=True)
        # dist_checkpointing.load replaces the entries in the dictionary that it gets
        shards = {name: dict((wanted if name == MAIN else wanted[name])["model"]) for name in self.models}
        if self.rows is not None:
            count = common["workers"]
            wanted["data"] = [
                ShardedObject("data", None, (count,), (worker,), replica_id=self.vlm.groups.dp_rank)
                for worker in range(count)
            ]
        if common["layout"] != self._layout:
            del wanted["rng"]
        state = load_checked(wanted, folder)
        self.optimizers.unfrozen_at = dict(state.get("thawed_at", {}))
        for name, model in self.models.items():
            found = state if name == MAIN else state[name]
            model.vlm.load_sharded(found["model"])
            scheduler, done = model.optimizers.scheduler, state["schedule"]
            if name != MAIN:
                done = state["schedules"][name]
            scheduler.step(increment=done - scheduler.num_steps)  # the schedule itself follows from the settings
            load_state(model.optimizers, found["optimizer"], shards[name])
            model.optimizers.follow_settings()
        if self.rows is not None:
            different = self.rows.load_state_dict(state["data"])
            if different and self.vlm.groups.dp_rank == 0:
                _log.warning("%s", different)
        if "rng" in state:
            set_random_state(state["rng"])
        self._hf_layout = _layout_in(folder)
        return state["step"]

    def _check_weights(self, checkpoint: McoreCheckpoint) -> None:
        for name, model in self.models.items():
            if model.adapters is not None and name == MAIN:
                Adapter(checkpoint.path, model.vlm.shapes)
            elif model.adapters is None:  # Megatron names what is missing of another model's adapters
                check_checkpoint(checkpoint, model.vlm.shapes, prefix="" if name == MAIN else f"{name}.")

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
            # Worker w of data-parallel rank r has the number r + dp_size × w, which is the order of their rows.
            count = groups.dp_size * len(states)
            state["workers"] = count  # the value of rank 0 is stored, which reads rows
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
        publish(folder, self.settings.keep, self.settings.keep_every, self._best)


def _sharded_model(model: TrainedModel, *, loading: bool) -> dict:
    """Returns the sharded state of a model and its optimizers, to be saved or to be loaded into."""
    metadata = dict(SHARDED_METADATA)
    weights = model.vlm.sharded_state_dict(metadata)
    if model.adapters is not None:
        weights = learned(weights)
    state_of = wanted_state if loading else saved_state
    return {"model": weights, "optimizer": state_of(model.optimizers, weights, metadata)}


def _layout_in(start: Path) -> str | None:
    """The description of the Hugging Face files in a checkpoint or of a folder; None if the checkpoint has none."""
    found = layout_of(start)
    return found.to_json() if found is not None else None


def random_state() -> dict:
    """Returns the state of all random number generators of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),  # without a GPU, the platform returns the state of torch's CPU generator
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict) -> None:
    """Sets the state of all random number generators of this rank to a result of ``random_state``."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
