"""Gradient buffers, optimizers and the learning-rate schedule, one set for each trainable part of the model.

Megatron's DistributedDataParallel and optimizers are built for each part separately: for the tower and the projector
over the whole world (frames are distributed over all ranks), for the decoder over its data-parallel ranks. This gives
the gradient norm of each part, and a frozen part takes no memory until it is unfrozen. All parts are clipped together
and stepped together.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.config.requirements import required
from megavlm.config.train_section import TrainSettings
from megavlm.model.vlm import PARTS, VLM
from megavlm.optim import megatron_galore, megatron_muon, stored_adam
from megavlm.optim.ema import start_averages, update_averages
from megavlm.optim.grad_stats import GradStats, read_grad_stats
from megavlm.optim.param_groups import ParamGroups
from megavlm.optim.part_ddp import PartDDP
from megavlm.optim.schedule import Schedule
from megavlm.optim.stored_adam import StoredAdam
from megavlm.platform import device


class Optimizers:
    """The gradient buffers, optimizers and schedule of all parts.

    Create it after the weights have been loaded, because the optimizers keep a float32 copy of them.

    Args:
        vlm: the model.
        train: the ``train`` section.
        updates_per_step: number of updates of the weights in a step of the run; the schedule counts updates.
        idle_steps: number of steps of the run without updates.

    Attributes:
        ddp: for each trainable part, one DistributedDataParallel per module (several with virtual pipelining).
        parts: for each trainable part, Megatron's optimizers (two if the part has experts).
        optimizer: Megatron's ChainedOptimizer over all parts.
        scheduler: the learning-rate schedule of this optimizer.
        unfrozen_at: for each part that was unfrozen during the run, the number of updates before that.
    """

    bucket_size: int | None = None
    """Number of weights whose gradients are reduced together during the backward pass; None: Megatron's choice."""

    def __init__(self, vlm: VLM, train: TrainSettings, updates_per_step: int = 1, idle_steps: int = 0):
        self.train, self._vlm, self._updates_per_step = train, vlm, updates_per_step
        # GaLore and Muon need whole matrices, but Megatron's DistributedOptimizer splits them; nor does it support SGD.
        sharded = train.optimizer == "adam"
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
            fp8_recipe=train.fp8.recipe if train.precision == "fp8" else None,
        )
        self.ddp: dict[str, list[PartDDP]] = {}
        self.parts: dict[str, list[MegatronOptimizer]] = {}
        self.unfrozen_at: dict[str, int] = {}
        self._late: list[PartDDP] = []  # those whose updated weights may not be here yet
        self._groups = ParamGroups(vlm, train)
        self._groups.freeze()
        for part in PARTS:
            self._build(part)
        self.optimizer = self._chained()
        self.scheduler = Schedule(self.optimizer, train, updates_per_step, idle_steps)

    def _build(self, part: str) -> None:
        """Creates the gradient buffers and optimizers of a part, if it has trainable parameters on some rank.

        Pipeline stages without any get empty ones: gradients and norms are summed over all of them.
        """
        modules = self._vlm.modules_of(part)
        learns = torch.tensor(any(p.requires_grad for m in modules for p in m.parameters()), dtype=torch.int32)
        dist.all_reduce(learns, op=dist.ReduceOp.MAX, group=self._vlm.groups.world_host)
        if not learns:
            return
        groups = self.groups_of(part)
        config = self._ddp_config(part, modules)
        is_late = config.overlap_grad_reduce and self.train.overlap.weights
        self.ddp[part] = [
            PartDDP(m.config, config, m, disable_bucketing=i > 0, pg_collection=groups, is_late=is_late)
            for i, m in enumerate(modules)
        ]
        own = self._groups.overrides(p for m in modules for p in m.parameters())
        with stored_adam.chosen(self.train, self._config):
            built = get_megatron_optimizer(
                self._config,
                self.ddp[part],
                {**get_standard_config_overrides(self._config), **own},  # by default, norms and biases have no decay
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
        optimizers = built.chained_optimizers if isinstance(built, ChainedOptimizer) else [built]
        # If only experts are trainable, as may be with adapters, Megatron adds an optimizer without parameters.
        self.parts[part] = [opt for opt in optimizers if not getattr(opt, "is_stub_optimizer", False)]
        if self.train.optimizer == "galore":
            for optimizer in self.parts[part]:
                megatron_galore.put_inside(optimizer, modules, self.train, groups)
        if self.train.optimizer == "muon":
            for optimizer in self.parts[part]:
                megatron_muon.put_inside(optimizer, self._vlm, self.train, groups)
        for stored in (opt.optimizer for opt in self.parts[part] if isinstance(opt.optimizer, StoredAdam)):
            stored.fill()
        if self.train.ema is not None:
            start_averages(self.parts[part])
        self._set_rates(part)

    def _ddp_config(self, part: str, modules: Sequence[torch.nn.Module]) -> DistributedDataParallelConfig:
        """How Megatron reduces the gradients of a part.

        To reduce during the backward pass, every rank must know that each weight gets a gradient in its last
        micro-batch. That is so in a decoder that is trained as a whole, but tower and projector have no gradient on a
        rank without frames, and beside a reward head the last stage's copy of a tied embedding has none.
        """
        whole = all(p.requires_grad for m in modules for p in m.parameters())
        overlap = part == "language" and whole and not any(hasattr(m, "score_head") for m in modules)
        return DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self._config.use_distributed_optimizer,
            overlap_grad_reduce=overlap and self.train.overlap.gradients,
            overlap_param_gather=self._config.use_distributed_optimizer,  # see ``PartDDP``
            align_param_gather=True,  # a forward pass that waits for some weights does not begin to gather others
            bucket_size=self.bucket_size,
        )

    def _set_rates(self, part: str) -> None:
        for group in (g for opt in self.parts[part] for g in opt.param_groups):
            group |= self._rates(part, group.get("lr_scale", 1.0))

    def _rates(self, part: str, lr_scale: float = 1.0) -> dict[str, float]:
        """What the scheduler reads of a parameter group."""
        scale = lr_scale * next((scale for name, scale in self.train.lr_scale.items() if name == part), 1.0)
        return {"max_lr": required(self.train.lr, "train.lr") * scale, "min_lr": self.train.min_lr * scale}

    def follow_settings(self) -> None:
        """Sets the learning rates by the settings and the position in the schedule.

        Call it after loading state, because the state of some optimizers contains the rates with which it was saved.
        """
        for part in self.parts:
            self._set_rates(part)
        self.scheduler.step(increment=0)

    def lr_with(self, train: TrainSettings) -> float:
        """The learning rate of the next step with another ``train`` section, at the same position in its schedule."""
        return self.scheduler.with_settings(train).get_lr({})

    def _chained(self) -> ChainedOptimizer:
        return ChainedOptimizer([opt for part in PARTS for opt in self.parts.get(part, [])])

    def groups_of(self, part: str) -> ProcessGroupCollection:
        """The process groups of a part."""
        return self._vlm.groups.language if part == "language" else self._vlm.groups.tower

    def unfreeze(self, step: int) -> list[str]:
        """Unfreezes the parts that are due before ``step`` (from 1) and returns them. Call it on all ranks.

        Each of these parts gets gradient buffers and an optimizer in its initial state, and follows the schedule from
        its current position. Load weights before this call, because the optimizers keep a float32 copy of them.
        """
        due: list[str] = [
            part for part, after in self.train.unfreeze_after.items() if after < step and part not in self.unfrozen_at
        ]
        for part in due:
            for module in self._vlm.modules_of(part):
                module.requires_grad_(True)
            self._groups.freeze()
            self._build(part)
            self.unfrozen_at[part] = self.scheduler.num_steps
        if due:
            self.optimizer = self.scheduler.optimizer = self._chained()
            self.scheduler.step(increment=0)  # sets the learning rate of the new optimizers
        return due

    def updates(self, part: str) -> int:
        """The number of updates of the weights of a part."""
        return self.scheduler.num_steps - self.unfrozen_at.get(part, 0)

    @property
    def lr(self) -> float:
        """Learning rate of the next step, for weights whose learning rate has no factor."""
        return self.scheduler.get_lr({})

    @property
    def part_lrs(self) -> dict[str, float]:
        """Learning rate of each part in the next step, 0.0 if the part is frozen."""
        return {part: self.scheduler.get_lr(self._rates(part)) if part in self.parts else 0.0 for part in PARTS}

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        for ddp in (d for ddps in self.ddp.values() for d in ddps):
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_gradients(self) -> None:
        """Reduces all gradients over the ranks that have parts of them."""
        for part, ddps in self.ddp.items():
            if part == "language":
                finalize_model_grads(ddps)
            else:
                for ddp in ddps:
                    ddp.finish_grad_sync()

    def step(self, totals: Tensor, weight: float, *, wait: bool = True) -> GradStats:
        """Clips the gradients in the buffers, applies them, and advances the schedule.

        If the loss or a gradient is NaN or infinite on any rank, all ranks skip this: weights, optimizer state and
        schedule do not change, and ``non_finite`` of the result lists the affected values. They do not change either if
        there is nothing to learn from.

        Args:
            totals: [sums] on the device, the objective's sums over the global batch.
            weight: the divisor of the loss; 0 if there is nothing to learn from.
            wait: see ``apply``.
        """
        stats = read_grad_stats(totals, weight, self.grad_squares())
        if not stats.non_finite and weight:
            self.apply(stats.norms["grad_norm"], wait=wait)
        return stats

    def wait_for_weights(self) -> None:
        """Waits until this rank has all updated weights. Ranks need not call it together.

        Only those of the decoder may be late, with ``train.overlap.weights``.
        """
        for ddp in self._late:
            ddp.wait()
        self._late = []

    def apply(self, grad_norm: float, *, wait: bool = True) -> None:
        """Clips the gradients, whose norm is known, updates the weights, and advances the schedule.

        Args:
            grad_norm: the norm of all gradients.
            wait: whether to wait for late weights. If not, call ``wait_for_weights`` before anything reads the
                decoder's weights, but for modules that are called.
        """
        if self.train.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                self.optimizer.get_parameters(), self.train.clip_grad, grad_norm, stored_adam.is_stored(self.train)
            )
        self.wait_for_weights()  # of the last update, for which nobody may have waited
        self.optimizer.step_with_ready_grads()
        for ddp in (d for ddps in self.ddp.values() for d in ddps):
            if ddp.ddp_config.overlap_param_gather:
                ddp.gather()
                self._late += [ddp] if ddp.is_late else []
        if wait:
            self.wait_for_weights()
        if self.train.ema is not None:
            update_averages(self.optimizer.chained_optimizers, self.train.ema)
        self.scheduler.step(increment=1)

    def grad_squares(self) -> Tensor:
        """float32 [parts] on the device: the squared gradient norm of each part over all ranks.

        Gradients are copied from the buffers to where the optimizers read them.
        """
        self.optimizer.prepare_grads()
        squares = torch.zeros(len(PARTS), dtype=torch.float32, device=device())
        for part, optimizers in self.parts.items():
            sums: dict[dist.ProcessGroup, Tensor] = {}
            for opt in optimizers:
                grads, group = opt.get_grads_for_grad_norm(), opt.get_grad_stats_parallel_group()
                if grads:
                    square = torch.stack(torch._foreach_norm(grads)).square().sum()
                    sums[group] = sums[group] + square if group in sums else square
            for group in self._norm_groups(part):  # even if this rank has nothing to add, because other ranks may
                square = sums.pop(group, squares.new_zeros(()))
                dist.all_reduce(square, group=group)
                squares[PARTS.index(part)] += square
            assert not sums, "an optimizer sums its norm over a group that is not in _norm_groups"
        return squares

    def _norm_groups(self, part: str) -> list[dist.ProcessGroup]:
        """The groups over which Megatron's optimizers of a part sum squared norms, for dense and for expert weights."""
        groups = self.groups_of(part)
        if self._config.use_distributed_optimizer:
            return [groups.intra_dist_opt]
        return list(dict.fromkeys([groups.mp, getattr(groups, "tp_ep_pp_with_egtp_remat", groups.tp_ep_pp)]))
