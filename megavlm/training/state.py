"""The state of a run as Megatron shards it: weights, optimizer, schedule, random numbers, place in the data."""

from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megavlm.convert import SHARDED_METADATA
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.model import score_head
from megavlm.model.vlm import VLM


def has_score_head(path: Path) -> bool:
    """Whether a checkpoint is of a reward model."""
    return score_head.KEY in McoreCheckpoint(path).tensors


def load_weights(path: Path, vlm: VLM) -> None:
    """Loads the weights of a checkpoint, saved by any layout or converted from Hugging Face, into ``vlm``.

    Optimizer state in it is left alone. A reward head stays as it is where the checkpoint has none.
    """
    wanted = vlm.sharded_state_dict(dict(SHARDED_METADATA))
    if not has_score_head(path):
        wanted = {name: entry for name, entry in wanted.items() if not name.endswith(score_head.KEY)}
    vlm.load_sharded(dist_checkpointing.load(wanted, str(path)))
    dist.barrier()
