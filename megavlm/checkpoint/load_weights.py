"""Loads the weights of checkpoints into a model, in any layout."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import while_bytes_flow
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.config.sections import ModelSettings
from megavlm.convert import SHARDED_METADATA, vocabulary
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.hf_shapes import model_shapes
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.peft_config import ADAPTER_CONFIG
from megavlm.convert.peft_names import CHECKPOINT_PREFIX
from megavlm.convert.safe_pickle import short
from megavlm.model import score_head
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.platform.collectives import on_first_rank


def has_score_head(path: Path) -> bool:
    """Whether a checkpoint contains the head of a reward model."""
    return score_head.KEY in McoreCheckpoint(path).tensors


def shapes_at_start(model: ModelSettings) -> Shapes:
    """The shapes of the model in ``model.hf``, after a comparison with the names and shapes in ``model.load``.

    A ``model.load`` that does not exist is not compared, because a dry run needs no weights.

    Raises:
        UserError: ``model.load`` is damaged, of another model, or contains an adapter without its base weights; and all
            errors of ``model_shapes``.
    """
    if model.load is None or not model.load.exists():
        return model_shapes(model)
    path = find_checkpoint(model.load)
    check_base(path)
    shapes = model_shapes(model, path)
    check_checkpoint(McoreCheckpoint(path), shapes, fewer_rows=model.resize_vocabulary)
    return shapes


def load_weights(path: Path, vlm: VLM) -> None:
    """Loads the weights of a checkpoint, saved in any layout or converted from Hugging Face, into ``vlm``.

    Optimizer state in the checkpoint is ignored. Adapters are unchanged, and so is a reward head if the checkpoint has
    none. Call it on all ranks.

    Raises:
        UserError: the checkpoint is damaged, of another model, or contains an adapter without its base weights.
    """
    check_base(path)
    check = lambda: check_checkpoint(McoreCheckpoint(path), vlm.shapes, fewer_rows=vlm.resize_vocabulary)
    on_first_rank(check, vlm.groups.world_host)
    without = () if has_score_head(path) else (score_head.KEY,)
    load_some(path, vlm, lambda key: not key.startswith(CHECKPOINT_PREFIX) and key not in without)


def check_base(path: Path) -> None:
    """Raises a UserError for the checkpoint of an adapter, which cannot be loaded without its base weights."""
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.load is {path}, which contains an adapter without its base weights",
            f"set model.load to the base weights, and model.adapter={path}",
        )


def load_some(path: Path, vlm: VLM, wanted: Callable[[str], bool]) -> None:
    """Loads the weights of a checkpoint for whose keys ``wanted`` returns true. The checkpoint must be checked.

    With ``model.resize_vocabulary``, rows of word embedding and output layer that the checkpoint lacks become the mean
    of those that it has.
    """
    shards = vlm.sharded_state_dict(dict(SHARDED_METADATA))
    shards = {name: entry for name, entry in shards.items() if wanted(entry.key)}
    grown = _grown_tables(path, vlm, shards) if vlm.resize_vocabulary else {}
    loaded = load_checked({name: shards[name] for name in shards if name not in grown}, path)
    vlm.load_sharded({**loaded, **grown})
    dist.barrier()


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


def _grown_tables(path: Path, vlm: VLM, shards: dict) -> dict[str, Tensor]:
    """This rank's rows, by name, of the tables in ``shards`` that have more rows than in the checkpoint."""
    checkpoint = McoreCheckpoint(path)
    keys = vocabulary.fewer_rows(checkpoint, vlm.shapes)
    # read and summed once, so that all ranks have the same bits
    means = on_first_rank(lambda: {key: vocabulary.mean_row(checkpoint, key) for key in keys}, vlm.groups.world_host)
    grown = {}
    for name, entry in shards.items():
        if entry.key in means:
            first, count = entry.global_offset[0], entry.local_shape[0]
            grown[name] = vocabulary.read_rows(checkpoint, entry.key, first, first + count, means[entry.key])
    return grown
