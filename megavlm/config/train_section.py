"""The train section: the optimizer, its schedule, and how the training steps run."""

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.config.group_section import GroupSettings
from megavlm.config.loss_section import LossSettings
from megavlm.config.profile_section import ProfileSettings
from megavlm.config.schedule_section import ScheduleSettings
from megavlm.config.section import Bool, Count, Float, Int, Part, Positive
from megavlm.config.speed_sections import (
    ExpertSettings,
    Fp8Settings,
    OverlapSettings,
    RecomputeModule,
)

_ADAM = ("adam", "galore", "muon")
_ONLY_FOR = {
    "adam_beta1": _ADAM,
    "adam_beta2": _ADAM,
    "adam_eps": _ADAM,
    "adam_moments": ("adam",),
    "offload_optimizer": ("adam",),
    "ema": ("adam",),
    "muon_momentum": ("muon",),
    "galore_rank": ("galore",),
    "galore_update_every": ("galore",),
    "galore_scale": ("galore",),
}
"""The optimizers that use a setting."""
# A bfloat16 changes by 1/256 to 1/128 of itself or not at all: a mean that should shrink by less than half of that
# stays. With 0.98, it shrinks as soon as squared gradients are below 0.8 of it; with 0.99 below 0.6; with 0.999 never.
_LARGEST_BETA2 = 0.98


class TrainSettings(ScheduleSettings):
    """The optimizer, its schedule, and how the training steps run."""

    @property
    def can_offload(self) -> bool:
        """Whether the optimizer's state could be in host memory, but is not."""
        return self.optimizer == "adam" and self.ema is None and not self.offload_optimizer

    lr_scale: dict[Part, Positive] = Field(
        {},
        description="factor by which the learning rate of a part is multiplied, for example {vision: 0.1}; parts that "
        "are not named have 1",
    )
    groups: list[GroupSettings] = Field(
        [],
        description="weights that are trained with another learning rate or weight decay, or not at all, for example "
        "[{match: embed_tokens, lr_scale: 0.1}, {match: 'layers\\.[01]\\.', freeze: true}]; ppo's "
        "critic has none",
    )
    layer_decay: Float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from one layer to the one below it, in the tower and in the decoder: "
        "the last layer has 1, the first layer_decay^(layers - 1), the embeddings below it layer_decay^layers. ppo's "
        "critic has 1 everywhere",
    )
    unfreeze_after: dict[Part, Count] = Field(
        {},
        description="number of steps after which a frozen part is unfrozen, for example {language: 1000}; its learning "
        "rate then follows the schedule of the run",
    )
    optimizer: Literal["adam", "sgd", "galore", "muon"] = Field(
        "adam",
        description="adam: AdamW, with its state distributed over the data-parallel ranks; sgd: stochastic gradient "
        "descent; galore: AdamW that keeps its moments of a matrix in a low-rank projection, which needs less memory; "
        "muon: orthogonalised momentum for the matrices of attention, MLPs and mergers (2502.16982), AdamW for all "
        "other weights, with AdamW's learning rate; as with galore, each data-parallel rank has the complete state",
    )
    muon_momentum: Float = Field(0.95, ge=0, lt=1, description="only for muon: decay rate of the momentum of matrices")
    galore_rank: Int = Field(128, ge=1, description="only for galore: rank of the projection")
    galore_update_every: Int = Field(
        200, ge=1, description="only for galore: number of steps after which the projection is computed again"
    )
    galore_scale: Float = Field(
        0.25,
        gt=0,
        le=1000,
        description="only for galore: factor by which the update of a projected matrix is multiplied",
    )
    ema: Float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay rate of a moving average of the trained weights, for example 0.999, which "
        "`megavlm export --ema` exports; it needs 4 bytes for each weight, divided over the data-parallel ranks. null: "
        "there is no average; ppo's critic never has one",
    )
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="decay rate of Adam's running mean of the gradients")
    adam_beta2: Float = Field(0.95, ge=0, lt=1, description="decay rate of Adam's running mean of squared gradients")
    adam_eps: Float = Field(1e-8, gt=0, description="constant added to the denominator of Adam's update")
    adam_moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="only for adam: number format of the two moments between updates, which are computed in float32. "
        "bf16 saves 4 bytes for each weight, divided over the data-parallel ranks, and rounds; checkpoints have "
        "float32",
    )
    offload_optimizer: Bool = Field(
        False,
        description="only for adam: whether its moments and the float32 copy of the weights are in host memory between "
        "updates, which frees 12 bytes for each weight (8 in fp32), divided over the data-parallel ranks. An update "
        "copies them to the GPU and back, some at a time",
    )
    weight_decay: Float = Field(0.1, ge=0, le=1000, description="coefficient of the weight decay")
    clip_grad: Float = Field(
        1.0, ge=0, description="maximum norm of the gradient of all parts together; 0: gradients are not clipped"
    )
    moe_aux_loss_coeff: Float = Field(
        0.001,
        ge=0,
        description="weight of the load-balancing loss of the experts (MoE models only); it has no effect while the "
        "decoder is frozen and has no adapters",
    )
    moe_z_loss_coeff: Float = Field(
        0.0,
        ge=0,
        description="weight of the routers' z-loss (MoE models only): the mean square of the logarithm of the sum of "
        "exponentials of their logits, which it keeps small; 0.001 is usual; 0: none",
    )
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        "bf16", description="number format of the computation; fp8 needs model.kernels te"
    )
    fp8: Fp8Settings = Fp8Settings()
    recompute: Literal["none", "full"] | list[RecomputeModule] = Field(
        "none",
        description="which activations of the decoder are recomputed in the backward pass to save memory. full: those "
        "of whole layers, for a third more computation; a list, for example [mlp]: those of the named modules. "
        "layernorm: norms that are modules of their own; mlp: dense MLPs; moe: whole layers of experts; moe_act: only "
        "the experts' activation function; core_attn: attention, which fused attention never keeps",
    )
    offload_activations: Bool = Field(
        False,
        description="only with recompute full: whether the layers' inputs, which it keeps, are in host memory until "
        "the backward pass, page-locked. This moves 2 bytes (4 in fp32) × hidden size for each layer and token of the "
        "rows between their passes; the copies run beside the computation",
    )
    overlap: OverlapSettings = OverlapSettings()
    experts: ExpertSettings = ExpertSettings()
    logprob_chunk_tokens: Int = Field(
        4096,
        ge=1,
        description="maximum number of tokens whose logits are in memory at the same time, with 6 to 8 bytes for each "
        "logit",
    )
    loss: LossSettings = LossSettings()
    kl_to_start: Float = Field(
        0.0,
        ge=0,
        description="only for sft: weight in the loss of the KL divergence from the model that training starts from, "
        "which helps to keep its abilities; 0: no such term. Otherwise each step has a second forward pass, "
        "and memory holds a copy of the trained weights",
    )
    max_skipped_steps: Int = Field(
        3,
        ge=0,
        description="maximum number of consecutive steps that may be skipped because the loss or a gradient is NaN or "
        "infinite; one more ends the run",
    )
    memory_check: Bool = Field(
        True,
        description="whether to run the longest row that may occur before the first step, to check that it fits into "
        "memory",
    )
    hang_minutes: Float | None = Field(
        30.0,
        ge=0.01,
        le=1e6,
        description="number of minutes without progress after which every rank writes its stacks and the run ends; "
        "null: no limit",
    )
    profile: ProfileSettings = Field(ProfileSettings(), description="traces of single steps by torch's profiler")
    seed: Int = Field(
        1234, ge=0, le=2**31 - 1, description="seed of the initial weights, the order of the data and dropout"
    )

    deterministic: Bool = Field(
        False,
        description="uses only kernels and collectives that repeat their results, so that on a GPU a resumed run has "
        "the same bits as one that nothing interrupted. Slower. On a CPU results repeat without it",
    )

    @field_validator("recompute", mode="before")
    @classmethod
    def _former_name(cls, value: Any) -> Any:
        """``selective`` was the only choice between none and full. Other words are named with all that are allowed."""
        value, modules = ["core_attn"] if value == "selective" else value, get_args(RecomputeModule)
        if value not in ("none", "full") and not (isinstance(value, list) and all(word in modules for word in value)):
            raise UserError(f"allowed: none | full | list of {', '.join(modules)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if 0 < self.clip_grad < 1e-6:
            raise UserError(
                f"train.clip_grad is {self.clip_grad:g}, which stops all learning", "1 is usual; 0 does not clip"
            )
        if self.steps is not None and self.profile.last > self.steps:
            raise UserError(
                f"train.profile.start and train.profile.steps ask for traces of steps {self.profile.start} to "
                f"{self.profile.last}, but train.steps is {self.steps}",
                "lower train.profile.start or train.profile.steps, or raise train.steps",
            )
        late = ", ".join(
            part for part, after in self.unfreeze_after.items() if self.steps is not None and after >= self.steps
        )
        if late:
            raise UserError(
                f"train.unfreeze_after is {self.unfreeze_after}, but train.steps is {self.steps}: "
                f"the entry for {late} would be ignored",
                f"unfreeze {late} after fewer than {self.steps} steps, or raise train.steps",
            )
        for name, optimizers in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.is_changed(name) and self.optimizer not in optimizers:
                value = f"{value:g}" if isinstance(value, float) else str(value).lower()
                raise UserError(
                    f"train.{name} is {value}, but train.optimizer is {self.optimizer}: it would be ignored",
                    f"remove {name} or choose optimizer {' or '.join(optimizers)}",
                )
        if self.ema is not None and (self.offload_optimizer or self.adam_moments != "fp32"):
            raise UserError(
                "train.ema is set, and so is train.offload_optimizer or train.adam_moments: the average is made of "
                "float32 weights on the GPU, which these do not keep there",
                "set ema to null, or remove offload_optimizer and adam_moments",
            )
        if self.adam_moments == "bf16" and self.adam_beta2 > _LARGEST_BETA2:
            raise UserError(
                f"train.adam_moments is bf16, but train.adam_beta2 is {self.adam_beta2:g}: bfloat16 rounds small "
                "changes of the running mean away, so that it would become smaller too late, or never",
                f"set adam_beta2 to {_LARGEST_BETA2} or less (0.95 is usual), or adam_moments to fp32",
            )
        return self
