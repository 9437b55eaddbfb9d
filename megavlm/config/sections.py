"""Sections of a configuration file, one class each, with the default, range and description of every field.

The larger sections have files of their own. Defaults are stated only in these classes. Checks between fields of one
section are in its class, checks between sections in `settings.py`, and checks against the model's shapes and the number
of processes in the folder `layout/`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, FilePath, Float, Int, Part, Section, Str

RANDOM = Path("random")
"""The value of model.load with which a run insists on random weights."""


class ModelSettings(Section):
    """Which model to use, which weights to start from, and which parts to train."""

    hf: FilePath = Field(
        description="Hugging Face folder of the model. config.json gives the sizes of all layers; the tokenizer and "
        "the processor are read from it, too"
    )
    load: FilePath | None = Field(
        None,
        description="what to start from: a Hugging Face folder, most often that of model.hf; the output folder of a "
        "run; a Megatron checkpoint; or the word random: random weights drawn with train.seed (a folder of this name "
        "is written ./random)",
    )
    adapter: FilePath | None = Field(
        None,
        description="adapter to put on the weights of model.load: a folder in peft's format, or the output folder of a "
        "run that trained one; null: none",
    )
    freeze: list[Part] = Field(
        [],
        description="parts that are not trained. vision: patch embedding, position embedding and blocks of the vision "
        "tower; projector: merger and deepstack mergers; language: decoder, word embedding and output layer",
    )
    resize_vocabulary: Bool = Field(
        False,
        description="whether word embedding and output layer get rows for tokens that were added to the tokenizer: as "
        "many as the tokenizer has ids, rounded up to a multiple of 128. Rows that model.load lacks start as the mean "
        "of its rows. false: a tokenizer with more ids than the model has rows is refused",
    )
    kernels: Literal["auto", "te", "portable"] = Field(
        "auto",
        description="implementation of the layers. te: Transformer Engine; portable: plain PyTorch; auto: te on a GPU "
        "if it is installed, otherwise portable",
    )

    @field_validator("load", mode="before")
    @classmethod
    def _folder_named_random(cls, load: Any) -> Any:
        """Keeps ./random apart from the word, also when the settings are written to config.yaml."""
        return Path(load).absolute() if isinstance(load, str) and load != str(RANDOM) and Path(load) == RANDOM else load

    @field_validator("adapter", mode="before")
    @classmethod
    def _one_adapter(cls, adapter: Any) -> Any:
        if isinstance(adapter, list):
            raise UserError(
                "several adapters cannot be used at the same time",
                "export a model with the first one merged into it (megavlm export), and load that with the second one",
            )
        return adapter

    @property
    def start(self) -> Path | None:
        """The checkpoint, run or Hugging Face folder to start from; None: random weights."""
        return None if self.load == RANDOM else self.load

    @field_validator("freeze")
    @classmethod
    def _something_is_trained(cls, freeze: list[str]) -> list[str]:
        if len(set(freeze)) < len(freeze):
            raise UserError("a part is named twice")
        if len(freeze) == 3:
            raise UserError("nothing would be trained", "remove vision, projector or language from it")
        return freeze


class ParallelSettings(Section):
    """How the model is split over ranks. All ranks / (tensor × pipeline × context) is the data-parallel size."""

    tensor: Int = Field(
        1,
        ge=1,
        description="tensor parallelism: number of ranks that share the matrices of each layer; must divide the "
        "numbers of attention heads and vocabulary entries",
    )
    pipeline: Int = Field(
        1, ge=1, description="pipeline parallelism: number of stages into which the decoder's layers are divided"
    )
    virtual_pipeline: Int | None = Field(
        None,
        ge=2,
        description="number of chunks of layers on each stage (interleaved 1F1B schedule); null: one chunk (1F1B)",
    )
    first_stage_layers: Int | None = Field(
        None, ge=1, description="number of decoder layers in the first stage; null: as many as in the other stages"
    )
    last_stage_layers: Int | None = Field(
        None, ge=1, description="number of decoder layers in the last stage; null: as many as in the other stages"
    )
    context: Int = Field(
        1, ge=1, description="context parallelism: number of ranks that share the tokens of each row in the decoder"
    )
    expert: Int = Field(
        1,
        ge=1,
        description="expert parallelism: number of ranks over which the experts are distributed (MoE models only)",
    )
    expert_tensor: Int = Field(
        1, ge=1, description="number of ranks that share the matrices of each expert (MoE models only)"
    )
    sequence: Bool = Field(
        True,
        description="sequence parallelism: whether the tensor-parallel ranks also share the tokens outside of "
        "attention and MLPs; has an effect only if parallel.tensor is greater than 1",
    )

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is used: Megatron has it only for tensor > 1."""
        return self.sequence and self.tensor > 1

    @property
    def pieces(self) -> int:
        """Number of equal pieces into which context parallelism cuts each sample: two for each rank."""
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
    """How the vision tower encodes pictures and videos."""

    recompute: Bool = Field(
        False,
        description="whether to run the tower's forward pass again in the backward pass instead of keeping its "
        "activations in memory",
    )
    chunk_patches: Int = Field(
        16384, ge=4, description="maximum number of patches encoded at a time; a larger frame is encoded alone"
    )
    window: Int | None = Field(
        None,
        ge=1,
        description="number of micro-batches whose frames are encoded together and whose features are in memory at the "
        "same time; null: 4, or all of the step if there are several pipeline stages",
    )
    offload: Bool = Field(
        False,
        description="whether features that wait for the decoder, and pixels that wait for recomputation, are kept in "
        "host memory",
    )
    balance: Literal["model_parallel", "world"] = Field(
        "model_parallel",
        description="ranks over which the frames are distributed. model_parallel: the ranks that share a row; world: "
        "those of several data-parallel ranks (a block of about 32 ranks), which helps if some of them have "
        "larger pictures than others",
    )


class CheckpointSettings(Section):
    """When checkpoints are written and how many are kept."""

    every: Int | None = Field(
        None,
        ge=1,
        description="number of steps between checkpoints; null: only every_minutes counts. A checkpoint is also "
        "written at the end of the run and when it is stopped",
    )
    every_epochs: Int | None = Field(
        None, ge=1, description="number of passes over the training data between checkpoints; null: they do not count"
    )
    every_minutes: Float | None = Field(
        None,
        gt=0,
        description="maximum number of minutes between checkpoints; null: 30 without checkpoint.every and "
        "every_epochs, otherwise no maximum",
    )
    keep: Int = Field(3, ge=1, description="number of newest checkpoints that are kept; older ones are deleted")
    keep_every: Int | None = Field(
        None,
        ge=1,
        description="checkpoints whose step is a multiple of this number are never deleted; null: no such exception",
    )
    async_save: Bool = Field(
        True, alias="async", description="whether checkpoints are written in the background while training continues"
    )

    @property
    def minutes(self) -> float | None:
        """Minutes after which a checkpoint is due; None if only steps count."""
        return self.every_minutes or (30.0 if self.every is None and self.every_epochs is None else None)

    @model_validator(mode="after")
    def _consistent(self) -> "CheckpointSettings":
        if self.keep_every and (not self.every or self.keep_every % self.every):
            every = self.every or "null"
            raise UserError(
                f"checkpoint.keep_every is {self.keep_every}, but checkpoint.every is {every}: "
                "no checkpoints are written at these steps",
                f"choose a multiple of {self.every}" if self.every else "set checkpoint.every, or keep_every to null",
            )
        return self


class WandbSettings(Section):
    """Weights & Biases."""

    mode: Literal["auto", "off", "offline", "online"] = Field(
        "auto",
        description="whether the run is logged to Weights & Biases, and whether over the network. auto: online after "
        "`wandb login` or with WANDB_API_KEY, otherwise not at all, unless WANDB_MODE says something else; offline: to "
        "files in OUTPUT/wandb, which `wandb sync` uploads later; off: not at all",
    )
    project: Str = Field("megavlm", min_length=1, description="Weights & Biases project that the run belongs to")


class LogSettings(Section):
    """What a run reports during training."""

    every: Int = Field(1, ge=1, description="number of steps between lines of metrics.jsonl")
    phases: Bool = Field(
        False,
        description="whether metrics.jsonl tells how the seconds of a step divide into waiting for data, tower, "
        "exchange of features, decoder, head, reduction of gradients and optimizer",
    )
    plan: Bool | None = Field(
        None,
        description="whether the run is planned while it goes on (as by `megavlm plan`), so that the report shows "
        "predicted beside measured memory and time: a process with the lowest priority writes OUTPUT/plan.json. true: "
        "the end of a short run waits for it, for a minute at most; null: true on a GPU, but nothing waits",
    )
    wandb: WandbSettings = Field(WandbSettings(), description="Weights & Biases")
    tensorboard: Bool = Field(
        False,
        description="whether the lines of metrics.jsonl are also written for TensorBoard, to OUTPUT/tensorboard; needs "
        "the package tensorboard",
    )


class GenerateSettings(Section):
    """How answers are generated."""

    max_new_tokens: Int = Field(64, ge=1, description="maximum number of tokens in an answer")
    temperature: Float = Field(
        0.0,
        ge=0,
        description="sampling temperature; 0: the most likely token is always chosen (greedy decoding)",
    )
    top_p: Float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens whose probabilities sum to this; 1: all tokens"
    )
    top_k: Int = Field(0, ge=0, description="sample from this number of most likely tokens; 0: all tokens")
    samples: Int = Field(1, ge=1, description="number of answers to each question")
    stop: list[Annotated[Str, Field(min_length=1)]] = Field(
        [], description="texts that end an answer; the answer is what stands before the first of them"
    )
    batch_size: Int = Field(
        16,
        ge=1,
        description="number of answers that a data-parallel rank works on at the same time (with parallel.context: "
        "each of its context-parallel ranks)",
    )
    cache_gib: Float = Field(
        8.0,
        gt=0,
        description="memory in GiB for keys and values on a rank; answers wait until there is memory for their longest "
        "length",
    )
    batch_invariant: Bool = Field(
        False,
        description="whether an answer's log-probabilities are equal to the bit whatever is computed at the same time, "
        "on one process; many times slower",
    )

    @field_validator("temperature")
    @classmethod
    def _computable(cls, temperature: float) -> float:
        if 0 < temperature < 1e-3:
            raise UserError(
                "the logits divided by it may be infinite", "set 0, which always chooses the most likely token"
            )
        return temperature

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateSettings":
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"generate.samples is {self.samples}, but generate.temperature is 0 (greedy): all answers to a "
                "question would be the same",
                "set generate.temperature above 0 or remove samples",
            )
        for name in ("top_p", "top_k"):
            if self.temperature == 0 and self.is_changed(name):
                raise UserError(
                    f"generate.{name} is {getattr(self, name):g}, but generate.temperature is 0 (greedy): "
                    "it would be ignored",
                    f"set generate.temperature above 0 or remove {name}",
                )
        return self
