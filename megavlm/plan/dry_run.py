"""A dry run: computes what ranks of a cluster would have in memory, by building them in this one process.

The model is the real one, with its adapters, gradient buffers and optimizer. Its tensors are on the meta device (shapes
and dtypes without values), and the other ranks of its process groups do not exist (``megavlm.platform.absent_world``).
A dense model also runs a row forward and backward, through feed, tower, decoder, loss and the reduction of gradients. A
mixture of experts is only built, because the number of tokens of an expert depends on values.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from megavlm.adapters import nf4
from megavlm.adapters.attach import Adapters
from megavlm.align.registry import make_method
from megavlm.config.settings import Settings
from megavlm.data.row import Row, pack
from megavlm.data.synthetic_row import synthetic_samples
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.stored_adam import is_stored, state_bytes
from megavlm.plan.step_memory import RowsAtHand
from megavlm.runtime.session import MAIN, Session
from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
from megavlm.training.method import Method
from megavlm.training.objective import Objective
from megavlm.training.step import Step

_FRAME = (4, 4)  # patches of a picture, the smallest with several visual tokens


@dataclass(frozen=True)
class Held:
    """What a rank has in memory.

    Attributes:
        rank: the rank.
        model: the name of the model.
        parameters, learning: for each part (``PARTS``), the number of parameters and of trainable parameters.
        weights, gradients, optimizer: bytes, without activations. Weights are counted as ``adapter.quantize`` stores
            them, gradient buffers as Megatron pads them. The optimizer has this rank's part of the float32 copy of
            half-precision weights, and of its state (Adam's two moments), as far as they are on the GPU.
        reached: for each part, the number of trainable parameters that got a gradient when a row ran forward and
            backward; None if no row was run.
    """

    rank: int
    model: str
    parameters: dict[str, int]
    learning: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    reached: dict[str, int] | None


def dry_run(settings: Settings, verb: str, world_size: int) -> list[Held]:
    """Builds rank 0 and then, if there are several pipeline stages, the first rank of the last stage.

    Args:
        settings: the settings of the run. Some are replaced (``that_can_be_absent``).
        verb: a key of ``align.registry.METHODS``.
        world_size: number of ranks of the cluster.

    Raises:
        UserError: the settings do not fit the model, the verb or the number of processes.
    """
    method, pipeline = make_method(verb, settings), settings.parallel.pipeline
    settings = that_can_be_absent(settings)
    ranks = sorted({0, world_size // pipeline * (pipeline - 1)})
    return [held for rank in ranks for held in _run(settings, method, rank, world_size)]


def _run(settings: Settings, method: Method, rank: int, world_size: int) -> list[Held]:
    """What the main model and others that are trained take on a rank."""
    with absent_rank(settings, method, rank, world_size) as (session, trained):
        found = []
        for one in trained:
            is_dense = session.shapes.text.moe is None
            reached = _pass(session, one.vlm, one.optimizers, one.objective) if is_dense else None
            found.append(_held(one.vlm, one.adapters, one.optimizers, rank, reached, one.name))
        return found


def _parameters(vlm: VLM) -> dict[str, list[nn.Parameter]]:
    return {part: [p for module in vlm.modules_of(part) for p in module.parameters()] for part in PARTS}


def _held(
    vlm: VLM,
    adapters: Adapters | None,
    optimizers: Optimizers,
    rank: int,
    reached: dict[str, int] | None,
    model: str,
) -> Held:
    parts = _parameters(vlm)
    buffers = [b for ddps in optimizers.ddp.values() for d in ddps for b in (*d.buffers, *d.expert_parallel_buffers)]
    updated = [p for group in optimizers.optimizer.param_groups for p in group["params"]]
    weights = sum(p.nbytes for ps in parts.values() for p in ps)
    if adapters is not None and adapters.settings.quantize:
        double = adapters.settings.quantize == "nf4_double"
        frozen = [cast(nn.Parameter, linear.weight) for linear in adapters.linears]
        weights += sum(nf4.nbytes_of(weight.numel(), double=double) - weight.nbytes for weight in frozen)
    if model != MAIN and adapters is not None:  # the frozen weights are those of the main model
        weights = sum(p.nbytes for ps in parts.values() for p in ps if p.requires_grad)
    return Held(
        rank=rank,
        model=model,
        parameters={part: sum(p.numel() for p in ps) for part, ps in parts.items()},
        learning={part: sum(p.numel() for p in ps if p.requires_grad) for part, ps in parts.items()},
        weights=weights,
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(_state_bytes(optimizers, p) for p in updated),
        reached=reached,
    )


def _state_bytes(optimizers: Optimizers, parameter: torch.Tensor) -> int:
    """The bytes of the optimizer's state of a parameter, with its float32 copy."""
    train, numbers = optimizers.train, parameter.numel()
    if is_stored(train):
        return 0 if train.offload_optimizer else state_bytes(train) * numbers
    copy = 4 * numbers if train.precision != "fp32" else 0
    if train.optimizer == "adam":
        return copy + 4 * (2 + (train.ema is not None)) * numbers
    if train.optimizer in ("galore", "muon"):
        inside = (opt.optimizer for opts in optimizers.parts.values() for opt in opts)
        owner = next(
            opt for opt in inside if any(parameter is p for group in opt.param_groups for p in group["params"])
        )
        return copy + 4 * sum(math.prod(shape) for shape in owner.state_shapes(parameter).values())
    return copy


def _pass(session: Session, vlm: VLM, optimizers: Optimizers, objective: Objective) -> dict[str, int]:
    """Runs as many rows as fill the pipeline forward and backward. Returns ``Held.reached``."""
    settings, num_rows = session.settings, session.settings.parallel.pipeline
    feed = RowsAtHand(vlm, [_row(settings, session.shapes)] * num_rows)
    step = Step(vlm, optimizers, feed, num_rows, objective, None, settings.data.source_names)
    vlm.decoder_config.batch_p2p_comm = False  # torch cannot batch sends of meta tensors
    reached: set[torch.Tensor] = set()
    for parameter in (p for ps in _parameters(vlm).values() for p in ps if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(reached.add)
    step.gradients(feed.rows(num_rows))
    # a word embedding that two stages share gets the sum of the gradients of both
    reached |= {p for ps in _parameters(vlm).values() for p in ps if getattr(p, "shared_embedding", False)}
    return {
        part: sum(p.numel() for p in ps if p.requires_grad and p in reached) for part, ps in _parameters(vlm).items()
    }


def _row(settings: Settings, shapes: Shapes) -> Row:
    """Makes a row of two answers of half its length, which share small pictures.

    There is one picture for each rank of a model-parallel group, as far as they fit.
    """
    parallel, vision, pad_multiple = settings.parallel, shapes.vision, settings.pad_multiple
    merge = vision.spatial_merge_size
    length = settings.data.seq_length // 2 // pad_multiple * pad_multiple
    visual_tokens = _FRAME[0] * _FRAME[1] // merge**2
    count = min(parallel.tensor * parallel.context * parallel.pipeline, (length - 1) // visual_tokens)
    samples = synthetic_samples(
        torch.zeros(length, dtype=torch.int64),
        torch.zeros(count * _FRAME[0] * _FRAME[1], vision.patch_dim // vision.temporal_patch_size, dtype=torch.uint8),
        np.array([_FRAME] * count, dtype=np.int32).reshape(-1, 2),
        np.arange(count * visual_tokens),
        merge=merge,
        answers=2,
    )
    seq_length = settings.data.seq_length
    return pack(samples, seq_length, pad_id=0, grid_side=vision.grid_side, merge=merge, pad_multiple=pad_multiple)
