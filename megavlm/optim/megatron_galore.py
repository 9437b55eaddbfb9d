"""GaLore inside Megatron's optimizers, and its state in checkpoints.

Megatron's FP32Optimizer and Float16OptimizerWithFloat16Params own the float32 weights, the gradients and their norms.
From the optimizer that they wrap, they need only parameter groups and ``step``. They are therefore created around plain
SGD, which has no state, and GaLore replaces it afterwards. Tensor-parallel ranks project their own shards of a matrix.
Each data-parallel rank has the complete state.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router
from torch import Tensor, nn

from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.train_section import TrainSettings
from megavlm.optim.galore import GaLore

# Settings of the layout that determine which shard of a matrix a rank has, and the number of that shard.
_CUTS = (
    *("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers"),
    *("expert", "expert_tensor"),
)


class PartOptimizers(Protocol):
    """The part of ``optim.optimizers.Optimizers`` that this module uses."""

    train: TrainSettings
    parts: dict[str, list[MegatronOptimizer]]

    def groups_of(self, part: str) -> ProcessGroupCollection:
        """The process groups of a part."""

    def updates(self, part: str) -> int:
        """The number of updates of the weights of a part."""


def put_inside(
    optimizer: MegatronOptimizer, modules: Sequence[nn.Module], train: TrainSettings, groups: ProcessGroupCollection
) -> None:
    """Replaces the optimizer that a Megatron optimizer wraps by GaLore over the same float32 weights.

    Embeddings, the output layer and routers are not projected.

    Args:
        optimizer: the Megatron optimizer.
        modules: the modules of the part that the optimizer updates.
        train: the ``train`` section.
        groups: the process groups of the part.
    """
    inner = optimizer.optimizer
    if inner is None:
        return
    whole = [
        getattr(weight, "main_param", weight)
        for module in (m for part in modules for m in part.modules())
        for weight in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding | Router) or getattr(weight, "is_embedding_or_output_parameter", False)
    ]
    optimizer.optimizer = GaLore(
        inner.param_groups,
        lr=required(train.lr, "train.lr"),
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        rank=train.galore_rank,
        update_every=train.galore_update_every,
        scale=train.galore_scale,
        whole=whole,
        group=replicas(optimizer, groups),
    )


def has_galore(optimization: PartOptimizers) -> bool:
    """Whether these optimizers use GaLore."""
    return optimization.train.optimizer == "galore"


def check_layout(saved: dict, now: dict) -> None:
    """Raises UserError unless each rank has the same shards of all weights in both layouts (``parallel`` sections).

    The number of data-parallel and context-parallel ranks may differ, because these ranks have copies.
    """
    changed = [name for name in _CUTS if saved[name] != now[name]]
    if changed:
        was = ", ".join(f"parallel.{name} {saved[name]}" for name in changed)
        raise UserError(
            f"the checkpoint was written with {was}, but now the values are "
            f"{', '.join(str(now[name]) for name in changed)}; train.optimizer=galore projects the shards of matrices "
            "on each rank, so its state cannot be used with other shards",
            f"resume with {was}, or start a new run from it (model.load)",
        )


def state(optimization: PartOptimizers) -> dict[str, ShardedTensor]:
    """All tensors of the optimizers on this rank, including float32 weights, for saving or as the target of loading.

    Shards that several ranks have are saved once. Optimizers that have no state yet get their initial state. The
    numbers of steps are not included (``Optimizers.updates``).
    """
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        for key, tensor, replica in _tensors(optimization)
    }


def load(optimization: PartOptimizers, loaded: dict[str, Tensor]) -> None:
    """Copies the tensors that ``dist_checkpointing.load`` returned for ``state`` into the optimizers.

    Call it after the position of the schedule has been restored, because the numbers of steps follow from it.
    """
    for key, tensor, _ in _tensors(optimization):
        tensor.copy_(loaded[key])
    for part, optimizers in optimization.parts.items():
        for optimizer in optimizers:
            if optimizer.optimizer is not None:
                optimizer.optimizer.steps = optimization.updates(part)


@torch.no_grad()
def _tensors(optimization: PartOptimizers) -> Iterator[tuple[str, Tensor, int]]:
    """(key, tensor, number of the copy) of all tensors of the optimizers on this rank."""
    for part, optimizers in optimization.parts.items():
        for number, optimizer in enumerate(o for o in optimizers if o.optimizer is not None):
            cut = optimizer.get_grad_stats_parallel_group().rank()  # the ranks of this group have different shards
            replica = replicas(optimizer, optimization.groups_of(part)).rank()
            optimizer.optimizer.fill()
            for place, weight in enumerate(optimizer.get_parameters()):
                for name, tensor in {"param": weight.detach(), **optimizer.optimizer.state[weight]}.items():
                    yield f"optimizer.galore.{part}.{number}.{cut}.{place}.{name}", tensor, replica


def replicas(optimizer: MegatronOptimizer, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that have copies of the weights that this optimizer updates."""
    experts = any(group.get("is_expert_parallel") for group in optimizer.param_groups)
    return groups.expt_dp if experts else groups.dp_cp
