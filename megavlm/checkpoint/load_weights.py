"""Loads the weights of checkpoints and of Hugging Face folders into a model, in any layout."""

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat, while_bytes_flow
from megavlm.checkpoint.averages import AveragedCheckpoint
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.config.sections import ModelSettings
from megavlm.convert import SHARDED_METADATA, vocabulary
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.hf_shapes import is_hf_folder, model_shapes, warn_of_own_output
from megavlm.convert.hf_source import HfSource, open_source
from megavlm.convert.peft_config import ADAPTER_CONFIG
from megavlm.convert.peft_names import CHECKPOINT_PREFIX
from megavlm.convert.safe_pickle import short
from megavlm.convert.saved_modules import SavedModules
from megavlm.convert.threads import in_threads
from megavlm.convert.weight_source import WeightSource
from megavlm.model import score_head
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import PARTS, VLM
from megavlm.platform.collectives import on_first_rank


def has_score_head(path: Path) -> bool:
    """Whether a checkpoint or a Hugging Face folder contains the head of a reward model."""
    return score_head.KEY in open_source(path).tensors


def start_words(model: ModelSettings) -> str:
    """What a command starts from, for people: "random weights", "Hugging Face folder X" or "checkpoint X"."""
    if model.load is None:
        return "nothing: training needs model.load"
    if model.start is None:
        return "random weights"
    if is_hf_folder(model.start):
        return f"Hugging Face folder {model.start}"
    if not os.path.isdir(model.start / "checkpoints"):
        # a folder that does not exist, which a dry run allows, may become any of these
        return f"checkpoint {model.start}" if os.path.exists(model.start) else str(model.start)
    newest = latest(model.start / "checkpoints")
    return f"checkpoint {newest}" if newest is not None else f"run {model.start}, which has no checkpoint yet"


def shapes_at_start(model: ModelSettings) -> Shapes:
    """The shapes of the model in ``model.hf``, after a comparison with the names and shapes in ``model.load``.

    A ``model.load`` that does not exist is not compared, because a dry run needs no weights.

    Raises:
        UserError: ``model.load`` is damaged, of another model, or contains an adapter without its base weights; and all
            errors of ``model_shapes``.
    """
    if model.start is None or not model.start.exists():
        return model_shapes(model)
    path = find_checkpoint(model.start)
    check_base(path)
    shapes = model_shapes(model, path)
    check_checkpoint(open_source(path), shapes, fewer_rows=model.resize_vocabulary)
    return shapes


def load_weights(path: Path, vlm: VLM, *, ema: bool = False) -> None:
    """Loads weights into ``vlm``: of a checkpoint, saved in any layout or converted, or of a Hugging Face folder.

    With ``ema``, they are the moving averages of the weights, in a checkpoint that has them (``train.ema``). Optimizer
    state in the checkpoint is ignored. Adapters are unchanged, and so is a reward head if there is none in
    ``path``. Call it on all ranks.

    Raises:
        UserError: the folder is damaged, of another model, or contains an adapter without its base weights.
    """
    check_base(path)

    def check() -> bool:
        source = open_source(path)
        check_checkpoint(source, vlm.shapes, fewer_rows=vlm.resize_vocabulary)
        if isinstance(source, HfSource):
            warn_of_own_output(path, source.layout)
        return score_head.KEY in source.tensors

    without = () if on_first_rank(check, vlm.groups.world_host) else (score_head.KEY,)
    wanted = lambda key: not key.startswith(CHECKPOINT_PREFIX) and key not in without
    load_some(path, vlm, wanted, AveragedCheckpoint(path) if ema else None)


def check_base(path: Path) -> None:
    """Raises a UserError for the checkpoint of an adapter, which cannot be loaded without its base weights."""
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.load is {path}, which contains an adapter without its base weights",
            f"set model.load to the base weights, and model.adapter={path}",
        )


def load_some(path: Path, vlm: VLM, wanted: Callable[[str], bool], source: WeightSource | None = None) -> None:
    """Loads the weights in a folder for whose keys ``wanted`` returns true. The folder must be checked.

    ``source`` is the folder if it is open already.

    With ``model.resize_vocabulary``, rows of word embedding and output layer that the folder lacks become the mean of
    those that it has.
    """
    source = source or open_source(path)
    shards = vlm.sharded_state_dict(dict(SHARDED_METADATA))
    shards = {name: entry for name, entry in shards.items() if wanted(entry.key)}
    grown = _grown_tables(source, vlm, shards) if vlm.resize_vocabulary else {}
    stored = {name: shards[name] for name in shards if name not in grown}
    if isinstance(source, HfSource | SavedModules | AveragedCheckpoint):
        _copy_shares(source, vlm, stored)
        vlm.load_sharded(grown)
    else:
        vlm.load_sharded({**load_checked(stored, path), **grown})
    dist.barrier(vlm.groups.world_host)


def _copy_shares(source: HfSource | SavedModules | AveragedCheckpoint, vlm: VLM, shards: dict) -> None:
    """Copies this rank's share of each weight from the folder's files straight into the parameters."""
    apply_factories(shards)  # gate and up of this rank are two boxes of a tensor; both are views of the parameter
    modules = [module for part in PARTS for module in vlm.modules_of(part)]
    parameters = {parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()}

    def copy(shard: ShardedTensor) -> None:
        assert shard.data is not None, shard.key
        assert shard.data.untyped_storage().data_ptr() in parameters, f"{shard.key} is a copy of the parameter"
        whole = shard.data.detach()[(None,) * shard.prepend_axis_num]  # an expert is a box of the stacked experts
        source.copy_box(shard.key, shard.global_offset, whole)
        beat(f"loading {shard.key}")

    in_threads(copy, list(nested_values(shards)))


def load_checked(shards: dict, path: Path) -> dict:
    """What ``dist_checkpointing.load`` returns for ``shards``.

    Megatron unpickles the checkpoint's description and objects, so ``McoreCheckpoint.check_contents`` must have passed.

    Raises:
        UserError: something in the checkpoint is missing or cannot be read.
    """
    try:
        with while_bytes_flow(f"loading {path}"):
            return dist_checkpointing.load(shards, str(path))
    except CheckpointingException as error:
        raise UserError(f"{path} cannot be loaded: {short(error)}", "use another checkpoint") from error
    except CheckpointException as error:  # torch's, which is no Exception and whose text contains tracebacks
        cause = next((short(failure) for failure, _ in error.failures.values()), "unknown")
        raise UserError(f"{path} cannot be loaded: {cause}", "use another checkpoint") from error


def _grown_tables(source: WeightSource, vlm: VLM, shards: dict) -> dict[str, Tensor]:
    """This rank's rows, by name, of the tables in ``shards`` that have more rows than in the folder."""
    keys = vocabulary.fewer_rows(source, vlm.shapes)
    # read and summed once, so that all ranks have the same bits
    means = on_first_rank(lambda: {key: vocabulary.mean_row(source, key) for key in keys}, vlm.groups.world_host)
    grown = {}
    for name, entry in shards.items():
        if entry.key in means:
            first, count = entry.global_offset[0], entry.local_shape[0]
            grown[name] = vocabulary.read_rows(source, entry.key, first, first + count, means[entry.key])
    return grown
