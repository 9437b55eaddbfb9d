"""The size of a checkpoint of a run, and how long ranks take to write it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.settings import Settings
from megavlm.convert.names import table
from megavlm.model.configs import DTYPES
from megavlm.model.shapes import Shapes
from megavlm.optim.stored_adam import state_bytes
from megavlm.plan.gpus import Gpu
from megavlm.tracing.static_memory import StaticMemory


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: weights and the optimizer's state, each number once.

    Attributes:
        size: bytes of all files.
        seconds: until all hosts have written their shares.
        background: whether the run goes on in the meantime (``checkpoint.async_save``).
    """

    size: int
    seconds: float
    background: bool


def checkpoint_of(
    settings: Settings, shapes: Shapes, static: Sequence[StaticMemory], world_size: int, gpu: Gpu
) -> Checkpoint:
    """Plans a checkpoint.

    Ranks share the writing evenly, and a host writes ``storage`` bytes of ``gpus.yaml`` in a second, an assumption.

    Args:
        settings, shapes: those of the run.
        static: what the first rank of each pipeline stage holds.
        world_size: number of ranks.
        gpu: the GPU.
    """
    state = sum(stage.optimizer + stage.on_host for stage in static) * world_size // len(static)
    optimizer = state * 12 // state_bytes(settings.train)  # rounded moments are saved in float32
    itemsize = DTYPES[settings.train.precision].itemsize
    if settings.adapter.type is None:
        weights = itemsize * sum(math.prod(entry.shape) for entry in table(shapes))
    else:  # adapters alone, at most: a gradient has four bytes, and some matrices are on all tensor ranks
        weights = sum(stage.gradients for stage in static) // 4 * itemsize * settings.parallel.tensor
    hosts = math.ceil(world_size / gpu.nvlink_domain)
    size = weights + optimizer
    return Checkpoint(size, size / hosts / (gpu.operators["storage"] * 1e9), settings.checkpoint.async_save)
