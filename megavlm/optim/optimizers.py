"""Gradient buffers, optimizers and the learning-rate schedule, one set for each part of the model that learns.

Megatron's DistributedDataParallel and optimizers are built per part: the tower's and the projector's over the whole
world (their frames are dealt over all ranks), the decoder's over its data ranks. So each part's gradient norm is at
hand, a frozen part costs nothing until it is unfrozen, and all of them are clipped and stepped as one.
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim import megatron_galore
from megavlm.optim.grad_stats import GradStats, read_grad_stats
from megavlm.platform import device


class Optimizers:
    """Everything that turns gradients into weights.

    Attributes:
        ddp: per learning part, one DistributedDataParallel per module (several under virtual pipelining).
        parts: per learning part, Megatron's optimizers (two where it has experts).
        optimizer: Megatron's ChainedOptimizer over all parts. scheduler: its OptimizerParamScheduler.
        unfrozen_at: for each part that was unfrozen during the run, the number of updates done before that.
    """

    def __init__(self, vlm: VLM, train):
        """``train``: TrainSettings. Build after the weights are loaded: optimizers keep a float32 copy of them."""
        self.train, self._vlm = train, vlm
        sharded = train.optimizer == "adam"  # Megatron's DistributedOptimizer cuts no matrix into rows, and no SGD
        self._config = OptimizerConfig(
            optimizer="adam" if sharded else "sgd",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            sgd_momentum=0.0,
            bf16=train.precision != "fp32",
            params_dtype=vlm.decoder_config.params_dtype,
            use_distributed_optimizer=sharded,
            clip_grad=train.clip_grad,
        )
        self._ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
        self.ddp: dict[str, list[DistributedDataParallel]] = {}
        self.parts: dict[str, list] = {}
        self.unfrozen_at: dict[str, int] = {}
        for part in PARTS:
            self._build(part)
        self.optimizer = self._chained()
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=train.lr,
            min_lr=train.min_lr,
            lr_warmup_steps=train.warmup_steps,
            lr_decay_steps=max(train.steps, train.warmup_steps + 1),
            lr_decay_style=train.schedule,
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=train.steps,
            wd_incr_style="constant",
        )

    def _build(self, part: str) -> None:
        """Gradient buffers and optimizers of a part, if it learns.

        Raises:
            UserError: on all ranks, it learns in some pipeline chunks alone: gradients and norms are summed over all.
        """
        modules = self._vlm.modules_of(part)
        learning = [any(p.requires_grad for p in m.parameters()) for m in modules]
        flags = torch.tensor([any(learning), not all(learning)], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._vlm.groups.world_host)
        some, lacking = flags.tolist()
        if not some:
            return
        if lacking:
            raise UserError(
                f"of {part}, something learns in some pipeline stages (or their chunks) and nothing in others",
                "put adapters on layers of all stages, let the part learn, or use parallel.pipeline=1",
            )
        groups = self.groups_of(part)
        self.ddp[part] = [
            DistributedDataParallel(m.config, self._ddp_config, m, disable_bucketing=i > 0, pg_collection=groups)
            for i, m in enumerate(modules)
        ]
        built = get_megatron_optimizer(
            self._config, self.ddp[part], use_gloo_process_groups=False, pg_collection=groups
        )
        optimizers = built.chained_optimizers if isinstance(built, ChainedOptimizer) else [built]
        # beside experts alone, as adapters may be, Megatron builds one of nothing for all other weights
        self.parts[part] = [opt for opt in optimizers if not getattr(opt, "is_stub_optimizer", False)]
        if self.train.optimizer == "galore":
            for optimizer in self.parts[part]:
                megatron_galore.put_inside(optimizer, modules, self.train, groups)
        for group in (g for opt in self.parts[part] for g in opt.param_groups):
            scale = self.train.lr_scale.get(part, 1.0)
            group["max_lr"], group["min_lr"] = self.train.lr * scale, self.train.min_lr * scale  # read by the scheduler

    def _chained(self) -> ChainedOptimizer:
        return ChainedOptimizer([opt for part in PARTS for opt in self.parts.get(part, [])])

    def groups_of(self, part: str):
        """Megatron's ProcessGroupCollection of a part."""
        return self._vlm.groups.language if part == "language" else self._vlm.groups.tower

    def unfreeze(self, step: int) -> list[str]:
        """Before ``step`` (from 1): starts training the frozen parts that are due and returns them. Call on all ranks.

        Each gets its gradient buffers and an optimizer that has seen nothing, and takes the schedule where it stands.
        Their weights are to be final: optimizers keep a float32 copy of them.
        """
        due = [
            part for part, after in self.train.unfreeze_after.items() if after < step and part not in self.unfrozen_at
        ]
        for part in due:
            for module in self._vlm.modules_of(part):
                module.requires_grad_(True)
            self._build(part)
            self.unfrozen_at[part] = self.scheduler.num_steps
        if due:
            self.optimizer = self.scheduler.optimizer = self._chained()
            self.scheduler.step(increment=0)  # tells the new ones their learning rate
        return due

    def updates(self, part: str) -> int:
        """How often the weights of a part have been updated."""
        return self.scheduler.num_steps - self.unfrozen_at.get(part, 0)

    @property
    def lr(self) -> float:
        """Learning rate of the step to come, of a part that has no scale of its own."""
        return self.scheduler.get_lr({})

    @property
    def part_lrs(self) -> dict[str, float]:
        """Learning rate of the step to come of each part, 0.0 where it is frozen."""
        return {part: self.parts[part][0].param_groups[0]["lr"] if part in self.parts else 0.0 for part in PARTS}

    def zero_grad(self) -> None:
        for ddp in (d for ddps in self.ddp.values() for d in ddps):
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, totals: Tensor, weight: float) -> GradStats:
        """Clips and applies the gradients that stand in the buffers and moves the schedule on.

        Where the loss or a gradient is not finite on any rank, no rank does: weights, optimizer state and schedule stay
        as they are, and the result's ``non_finite`` says what it was.

        Args:
            totals: [sums] on the device, the objective's sums over the global batch. weight: the loss's divisor.
        """
        self.optimizer.prepare_grads()
        stats = read_grad_stats(totals, weight, self._squares())
        if stats.non_finite:
            return stats
        if self.train.clip_grad > 0:
            norm = stats.norms["grad_norm"]
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), self.train.clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return stats

    def _squares(self) -> Tensor:
        """float32 [parts] on the device: the squared gradient norm of each part over all ranks."""
        squares = torch.zeros(len(PARTS), dtype=torch.float32, device=device())
        for part, optimizers in self.parts.items():
            sums: dict[dist.ProcessGroup, Tensor] = {}
            for opt in optimizers:
                grads, group = opt.get_grads_for_grad_norm(), opt.get_grad_stats_parallel_group()
                if grads:
                    square = torch.stack(torch._foreach_norm(grads)).square().sum()
                    sums[group] = sums[group] + square if group in sums else square
            for group in self._norm_groups(part):  # also where this rank has nothing to add, for others may
                square = sums.pop(group, squares.new_zeros(()))
                dist.all_reduce(square, group=group)
                squares[PARTS.index(part)] += square
            assert not sums, "an optimizer that adds up its norm over another group"
        return squares

    def _norm_groups(self, part: str) -> list[dist.ProcessGroup]:
        """Ranks that hold pieces of a part's gradients, as Megatron tells its optimizers: for all, or with experts'."""
        groups = self.groups_of(part)
        if self._config.use_distributed_optimizer:
            return [groups.intra_dist_opt]
        return list(dict.fromkeys([groups.mp, getattr(groups, "tp_ep_pp_with_egtp_remat", groups.tp_ep_pp)]))
