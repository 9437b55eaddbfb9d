"""GaLore in the training loop: put under Megatron's optimizers, and its state in a checkpoint.

Megatron's FP32Optimizer and Float16OptimizerWithFloat16Params own the float32 weights, the gradients and their norms;
of the optimizer inside they want parameter groups and ``step``. So they are made around plain SGD, which has no state,
and GaLore takes its place. Tensor ranks project their own pieces of a matrix; every data rank holds all of the state.
"""

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import Router
from torch import Tensor, nn

from megavlm.base.errors import UserError
from megavlm.optim.galore import GaLore

# Settings of the layout that decide which piece of a matrix a rank holds, and under which number.
_CUTS = (
    *("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers"),
    *("expert", "expert_tensor"),
)


def put_inside(optimizer: MegatronOptimizer, modules: list[nn.Module], train, groups) -> None:
    """Replaces what is inside one of Megatron's optimizers by GaLore over the same float32 weights.

    Embeddings, the output layer and routers are not projected.

    Args:
        modules: of the part, which the optimizer updates. train: TrainSettings. groups: the part's process groups.
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
        lr=train.lr,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        rank=train.galore_rank,
        update_every=train.galore_update_every,
        scale=train.galore_scale,
        whole=whole,
        group=_replicas(optimizer, groups),
    )


def has_galore(optimization) -> bool:
    """Whether these optimizers are GaLore's."""
    return optimization.train.optimizer == "galore"


def check_layout(saved: dict, now: dict) -> None:
    """Raises UserError unless a rank holds the same pieces of all weights in both layouts (settings of parallel).

    The number of data and context ranks may differ: they hold copies.
    """
    changed = [name for name in _CUTS if saved[name] != now[name]]
    if changed:
        was = ", ".join(f"parallel.{name} {saved[name]}" for name in changed)
        raise UserError(
            f"the checkpoint was written with {was}, now it is {', '.join(str(now[name]) for name in changed)}; "
            "train.optimizer galore projects the pieces of matrices that a rank holds, and cannot go on with others",
            f"resume with {was}, or start a new run from it (model.load)",
        )


def state(optimization) -> dict[str, ShardedTensor]:
    """All tensors of the optimizers on this rank, float32 weights among them, to be saved or loaded into.

    Ranks that hold the same pieces save them once. Optimizers that have no state yet get that of one that has seen
    nothing. The numbers of steps are not in it (``Optimizers.updates``).
    """
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        for key, tensor, replica in _tensors(optimization)
    }


def load(optimization, loaded: dict[str, Tensor]) -> None:
    """Takes over what ``dist_checkpointing.load`` returned for ``state``; the schedule stands where it stood."""
    for key, tensor, _ in _tensors(optimization):
        tensor.copy_(loaded[key])
    for part, optimizers in optimization.parts.items():
        for optimizer in optimizers:
            if optimizer.optimizer is not None:
                optimizer.optimizer.steps = optimization.updates(part)


@torch.no_grad()
def _tensors(optimization) -> Iterator[tuple[str, Tensor, int]]:
    """(key, tensor, number of the copy) of all that the optimizers hold on this rank."""
    for part, optimizers in optimization.parts.items():
        for number, optimizer in enumerate(o for o in optimizers if o.optimizer is not None):
            cut = optimizer.get_grad_stats_parallel_group().rank()  # ranks in it hold different pieces
            replica = _replicas(optimizer, optimization.groups_of(part)).rank()
            optimizer.optimizer.fill()
            for place, weight in enumerate(optimizer.get_parameters()):
                for name, tensor in {"param": weight.detach(), **optimizer.optimizer.state[weight]}.items():
                    yield f"optimizer.galore.{part}.{number}.{cut}.{place}.{name}", tensor, replica


def _replicas(optimizer: MegatronOptimizer, groups):
    """Ranks that hold copies of what this optimizer updates."""
    experts = any(group.get("is_expert_parallel") for group in optimizer.param_groups)
    return groups.expt_dp if experts else groups.dp_cp
