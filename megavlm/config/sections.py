"""The sections of a configuration file but data's, one class each: every field with its default, range and meaning.

Nothing else in the package states a default. A check between fields of one section stands in that section; checks
between sections are in `settings.py`, checks against the model's shapes and the number of processes in `layout.py`.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, Count, FilePath, Float, Int, Part, Positive, Section, Str


class ModelSettings(Section):
    """Which model, from which weights, and which parts of it learn."""

    hf: FilePath = Field(description="Hugging Face folder: config.json gives all shapes; tokenizer and processor files")
    load: FilePath | None = Field(
        None, description="Megatron checkpoint to start from; null: random weights (train.seed)"
    )
    adapter: FilePath | None = Field(
        None,
        description="adapter on the weights of load: a folder in peft's format, or a run that trained one",
    )
    freeze: list[Part] = Field(
        [],
        description="parts that do not learn. vision: patch and position embedding, blocks; projector: merger and "
        "deepstack mergers; language: the decoder, its embedding and output layer",
    )
    kernels: Literal["auto", "te", "portable"] = Field(
        "auto", description="te: Transformer Engine; portable: plain PyTorch; auto: te on a GPU that has it"
    )

    @field_validator("freeze")
    @classmethod
    def _something_learns(cls, freeze: list[str]) -> list[str]:
        if len(set(freeze)) < len(freeze):
            raise UserError("a part is named twice")
        if len(freeze) == 3:
            raise UserError("nothing would be trained", "leave vision, projector or language out")
        return freeze


class ParallelSettings(Section):
    """How the model is cut over processes; what is left over of the world is data-parallel."""

    tensor: Int = Field(1, ge=1, description="processes that share each layer's matrices; divides heads and vocabulary")
    pipeline: Int = Field(1, ge=1, description="pipeline stages of the decoder's layers")
    virtual_pipeline: Int | None = Field(None, ge=2, description="chunks of layers per stage (interleaved 1F1B)")
    first_stage_layers: Int | None = Field(
        None, ge=1, description="decoder layers of the first stage; null: as many as the others"
    )
    last_stage_layers: Int | None = Field(None, ge=1, description="decoder layers of the last stage; null: likewise")
    context: Int = Field(1, ge=1, description="processes that share a row's tokens in attention")
    expert: Int = Field(1, ge=1, description="processes over which experts are dealt (MoE models only)")
    expert_tensor: Int = Field(1, ge=1, description="processes that share each expert's matrices (MoE models only)")
    sequence: Bool = Field(True, description="with tensor > 1, also share norms and residuals along the sequence")

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is at work: Megatron has it only for tensor > 1."""
        return self.sequence and self.tensor > 1

    @property
    def pieces(self) -> int:
        """Equal pieces in which context parallelism cuts each sample: an early and a late one for each rank."""
        return 2 * self.context if self.context > 1 else 1

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelSettings":
        if self.virtual_pipeline and self.pipeline == 1:
            raise UserError(
                f"parallel.virtual_pipeline is {self.virtual_pipeline}, but parallel.pipeline is 1: "
                "it would be ignored",
                "set parallel.pipeline to 2 or more, or virtual_pipeline to null",
            )
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) and self.pipeline == 1:
                raise UserError(
                    f"parallel.{name} is {getattr(self, name)}, but parallel.pipeline is 1: it would be ignored",
                    f"set parallel.pipeline to 2 or more, or {name} to null",
                )
        return self


class VisionSettings(Section):
    """How the vision tower runs."""

    recompute: Bool = Field(False, description="run the tower's forward again in backward, to keep less memory")
    chunk_patches: Int = Field(65536, ge=4, description="patches encoded at a time (a frame is never cut)")
    window: Int | None = Field(
        None,
        ge=1,
        description="micro-batches whose frames are encoded together, and whose features exist at one time; null: 4, "
        "with several pipeline stages the whole step",
    )
    offload: Bool = Field(False, description="features, and pixels to be encoded again, wait in host memory")
    balance: Literal["model_parallel", "world"] = Field(
        "model_parallel",
        description="ranks that share the frames: those of one row; or all, which relieves data ranks with heavy "
        "pictures",
    )


class TrainSettings(Section):
    """The optimizer and its schedule."""

    steps: Int | None = Field(None, ge=1, description="optimizer steps of the whole run")
    global_batch_size: Int | None = Field(None, ge=1, description="rows per step over all processes")
    lr: Float | None = Field(None, gt=0, description="highest learning rate")
    lr_scale: dict[Part, Positive] = Field(
        {}, description="of a part, how its learning rate differs from lr: {vision: 0.1}; others have 1"
    )
    unfreeze_after: dict[Part, Count] = Field(
        {},
        description="number of steps after which a frozen part is unfrozen: {language: 1000}; its learning rate then "
        "follows the schedule of the run",
    )
    min_lr: Float = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    warmup_steps: Int = Field(0, ge=0, description="steps over which the learning rate rises from 0 to lr")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="way from lr down to min_lr")
    optimizer: Literal["adam", "sgd", "galore"] = Field(
        "adam",
        description="adam: AdamW, its state shared over data ranks; sgd: plain gradient descent; galore: AdamW with "
        "low-rank moments of matrices, for all weights on few GPUs",
    )
    galore_rank: Int = Field(128, ge=1, description="of galore: rank of the moments of a matrix")
    galore_update_every: Int = Field(200, ge=1, description="of galore: steps after which the projection is renewed")
    galore_scale: Float = Field(0.25, gt=0, description="of galore: factor of a projected matrix's update")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="decay of Adam's mean of gradients")
    adam_beta2: Float = Field(0.95, ge=0, lt=1, description="decay of Adam's mean of squared gradients")
    adam_eps: Float = Field(1e-8, gt=0, description="added to Adam's denominator")
    weight_decay: Float = Field(0.1, ge=0, description="weight decay")
    clip_grad: Float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0: not clipped")
    moe_aux_loss_coeff: Float = Field(0.001, ge=0, description="weight of the load-balancing loss (MoE models only)")
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        "bf16", description="number format of the compute; fp8 needs model.kernels te"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="decoder activations computed again in backward: none, attention's, whole layers"
    )
    logprob_chunk_tokens: Int = Field(1024, ge=1, description="tokens whose logits exist at one time")
    kl_to_start: Float = Field(
        0.0,
        ge=0,
        description="of sft: weight of the divergence from the model that training starts from, which keeps what it "
        "can; 0: none (else a second forward pass, and a copy of what learns)",
    )
    max_skipped_steps: Int = Field(
        3, ge=0, description="steps in a row that may be skipped for a loss or gradient that is not finite; 0: none"
    )
    memory_check: Bool = Field(
        True, description="before the first step, run the longest row that may come, to see whether it fits in memory"
    )
    hang_minutes: Float | None = Field(
        30.0, gt=0, description="a run without a step for so long shows its stacks and ends; null: it waits"
    )
    seed: Int = Field(1234, ge=0, le=2**31 - 1, description="of weights, data order and dropout")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.lr is not None and self.min_lr > self.lr:
            raise UserError(
                f"train.min_lr is {self.min_lr:g}, more than train.lr, {self.lr:g}", "lower min_lr or raise lr"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise UserError(
                f"train.warmup_steps is {self.warmup_steps}, more than train.steps, {self.steps}",
                "warm up over fewer steps or train longer",
            )
        late = ", ".join(
            part for part, after in self.unfreeze_after.items() if self.steps is not None and after >= self.steps
        )
        if late:
            raise UserError(
                f"train.unfreeze_after is {self.unfreeze_after}, but train.steps is {self.steps}: "
                f"that of {late} would be ignored",
                f"unfreeze {late} after fewer than {self.steps} steps, or train longer",
            )
        if self.schedule == "constant" and self.min_lr:
            raise UserError(
                f"train.min_lr is {self.min_lr:g}, but train.schedule constant stays at lr: it would be ignored",
                "set min_lr to 0 or choose schedule cosine or linear",
            )
        for name in ("adam_beta1", "adam_beta2", "adam_eps"):
            if self.optimizer == "sgd" and self.is_changed(name):
                raise UserError(
                    f"train.{name} is {getattr(self, name):g}, but train.optimizer is sgd: it would be ignored",
                    f"remove {name} or choose optimizer adam",
                )
        for name in ("galore_rank", "galore_update_every", "galore_scale"):
            if self.optimizer != "galore" and self.is_changed(name):
                raise UserError(
                    f"train.{name} is {getattr(self, name):g}, but train.optimizer is {self.optimizer}: it would be "
                    "ignored",
                    f"remove {name} or choose optimizer galore",
                )
        return self


class CheckpointSettings(Section):
    """When checkpoints are written and how many are kept."""

    every: Int | None = Field(
        None, ge=1, description="steps between checkpoints; null: only at the end or when stopped"
    )
    keep: Int = Field(3, ge=1, description="newest checkpoints kept; older ones are deleted")
    keep_every: Int | None = Field(
        None, ge=1, description="checkpoints of steps divisible by this are never deleted; null: they are as all others"
    )
    async_save: Bool = Field(True, alias="async", description="write in the background while training goes on")

    @model_validator(mode="after")
    def _consistent(self) -> "CheckpointSettings":
        if self.keep_every and (not self.every or self.keep_every % self.every):
            every = self.every or "null"
            raise UserError(
                f"checkpoint.keep_every is {self.keep_every}, but checkpoint.every is {every}: "
                "there are no checkpoints at its steps",
                f"choose a multiple of {self.every}" if self.every else "set checkpoint.every, or keep_every to null",
            )
        return self


class WandbSettings(Section):
    """Weights & Biases."""

    mode: Literal["auto", "off", "offline", "online"] = Field(
        "auto", description="auto: online where an API key is found, otherwise offline"
    )
    project: Str = Field("megavlm", min_length=1, description="project the run appears in")


class LogSettings(Section):
    """What is reported while training."""

    every: Int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    wandb: WandbSettings = Field(WandbSettings(), description="Weights & Biases")


class GenerateSettings(Section):
    """How answers are generated."""

    max_new_tokens: Int = Field(64, ge=1, description="longest answer in tokens")
    temperature: Float = Field(0.0, ge=0, description="0: the likeliest token each time; above: sampled")
    top_p: Float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    top_k: Int = Field(0, ge=0, description="sample from this many likeliest tokens; 0: all")
    batch_size: Int = Field(16, ge=1, description="prompts answered together by each data-parallel rank")

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateSettings":
        for name in ("top_p", "top_k"):
            if self.temperature == 0 and self.is_changed(name):
                raise UserError(
                    f"generate.{name} is {getattr(self, name):g}, but generate.temperature is 0 (greedy): "
                    "it would be ignored",
                    f"set generate.temperature above 0 or remove {name}",
                )
        return self
