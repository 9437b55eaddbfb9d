"""The state of a run as Megatron shards it: weights, optimizer, schedule, random numbers, place in the data."""

from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megavlm.convert import SHARDED_METADATA
from megavlm.model.vlm import VLM


def load_weights(path: Path, vlm: VLM) -> None:
    """Loads the weights of a checkpoint, saved by any layout or converted from Hugging Face, into ``vlm``.

    Optimizer state in it is left alone.
    """
    vlm.load_sharded(dist_checkpointing.load(vlm.sharded_state_dict(dict(SHARDED_METADATA)), str(path)))
    dist.barrier()
