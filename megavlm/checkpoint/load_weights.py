"""Loads the weights of checkpoints into a model, in any layout."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megavlm.base.errors import UserError
from megavlm.convert import SHARDED_METADATA
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.peft_config import ADAPTER_CONFIG
from megavlm.convert.peft_names import CHECKPOINT_PREFIX
from megavlm.model import score_head
from megavlm.model.vlm import VLM


def has_score_head(path: Path) -> bool:
    """Whether a checkpoint contains the head of a reward model."""
    return score_head.KEY in McoreCheckpoint(path).tensors


def load_weights(path: Path, vlm: VLM) -> None:
    """Loads the weights of a checkpoint, saved in any layout or converted from Hugging Face, into ``vlm``.

    Optimizer state in the checkpoint is ignored. Adapters are unchanged, and so is a reward head if the checkpoint has
    none.

    Raises:
        UserError: the checkpoint contains an adapter without its base weights.
    """
    check_base(path)
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
    """Loads the weights of a checkpoint for whose keys ``wanted`` returns true."""
    shards = vlm.sharded_state_dict(dict(SHARDED_METADATA))
    shards = {name: entry for name, entry in shards.items() if wanted(entry.key)}
    vlm.load_sharded(dist_checkpointing.load(shards, str(path)))
    dist.barrier()
