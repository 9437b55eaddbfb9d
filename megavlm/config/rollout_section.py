"""The rollout section: how answers are sampled in reinforcement learning."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Bool, Count, FilePath, Float, Int, Positive, Section, Str

# Arguments of vLLM's engine that rollout.vllm.args cannot have, and where they come from.
OWN_ARGUMENTS = {
    "model": "model.hf",
    "dtype": "train.precision",
    "seed": "train.seed",
    "max_model_len": "data.seq_length",
    "max_num_seqs": "rollout.max_sequences",
    "kv_cache_memory_bytes": "rollout.cache_gib",
    "tensor_parallel_size": "rollout.vllm.tensor_parallel",
    "data_parallel_size": "rollout.vllm.servers",
    "logprobs_mode": "rollout.temperature",
    "load_format": "the trainer, which sends the weights",
    "weight_transfer_config": "the trainer, which sends the weights",
    "worker_extension_cls": "the trainer, which sends the weights",
}
_LEAST_OF_VLLM = 0.01  # vLLM raises lower temperatures to this


class VllmSettings(Section):
    """Servers of vLLM (rollout.engine: vllm)."""

    python: FilePath | None = Field(
        None,
        description="Python of the environment that has vLLM. null: that of `make vllm`, otherwise the trainer's own",
    )
    url: list[Str] = Field(
        [],
        description="addresses (http://HOST:PORT) of servers that were started elsewhere; none are started then",
    )
    servers: Count = Field(1, description="number of servers to start on the host of rank 0, shared by all ranks")
    tensor_parallel: Count = Field(1, description="number of devices of a server over which each layer is divided")
    devices: list[Annotated[Int, Field(ge=0)]] = Field(
        [],
        description="numbers of the GPUs for the servers, tensor_parallel for each in turn (not tried on GPUs "
        "yet). []: those that rank 0 sees",
    )
    start_minutes: Positive = Field(
        10.0, description="minutes within which a server must answer after its start, also after it was lost"
    )
    request_minutes: Positive = Field(
        30.0, description="minutes within which a server must have answered a prompt, or taken a part of the weights"
    )
    args: dict[Str, Any] = Field(
        {}, description="further arguments of vLLM's engine by their names in Python (AsyncEngineArgs)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "VllmSettings":
        for url in self.url:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
                raise UserError(f"rollout.vllm.url has {quoted(url)}, which is not http://HOST:PORT")
        for name in ("python", "servers", "tensor_parallel", "devices", "args"):
            if self.url and self.is_changed(name):
                raise UserError(
                    f"rollout.vllm.{name} is set, but rollout.vllm.url names servers that run: it would be ignored",
                    f"remove rollout.vllm.{name} or rollout.vllm.url",
                )
        needed = self.servers * self.tensor_parallel
        if self.devices and (len(self.devices) != needed or len(set(self.devices)) != needed):
            raise UserError(
                f"rollout.vllm.devices has {len(set(self.devices))} different numbers in {len(self.devices)}, but the "
                f"servers need {needed} (servers × tensor_parallel)",
                f"name {needed} different devices, or remove rollout.vllm.devices",
            )
        if taken := sorted(self.args.keys() & OWN_ARGUMENTS.keys()):
            raise UserError(
                f"rollout.vllm.args has {taken[0]}, which comes from {OWN_ARGUMENTS[taken[0]]}",
                f"remove it, and set {OWN_ARGUMENTS[taken[0]]}" if "." in OWN_ARGUMENTS[taken[0]] else "remove it",
            )
        return self


class RolloutSettings(Section):
    """How answers are sampled in reinforcement learning (grpo and ppo)."""

    engine: Literal["megatron", "vllm"] = Field(
        "megatron",
        description="what samples the answers, also those of infer. megatron: the weights that are trained, in their "
        "own layout; vllm: servers of vLLM, which get the weights before each batch (docs/vllm.md)",
    )
    vllm: VllmSettings = VllmSettings()
    partial: Literal["continue", "drop"] = Field(
        "continue",
        description="only with rollout.ahead: what becomes of answers that are being sampled when new weights come. "
        "continue: their next tokens come from the new weights; drop: they are sampled again from the start",
    )
    prompts: Int | None = Field(
        None, ge=1, description="number of prompts in a step, over all ranks; each gets group_size answers"
    )
    group_size: Int | None = Field(
        None,
        ge=1,
        description="number of answers to each prompt. grpo compares them to each other and needs at least 2. null: 16 "
        "for grpo, 1 for ppo",
    )
    max_new_tokens: Int = Field(
        1024,
        ge=1,
        description="maximum number of tokens in an answer. Prompts that leave less room than this in a row of "
        "data.seq_length tokens are dropped",
    )
    temperature: Float = Field(
        1.0,
        gt=0,
        description="sampling temperature. The log-probabilities that are trained are those at this temperature",
    )
    top_p: Float = Field(
        1.0,
        gt=0,
        le=1,
        description="sample from the most likely tokens whose probabilities sum to this; 1: all tokens. Below 1, the "
        "answers come from another distribution than the one that is trained",
    )
    top_k: Int = Field(
        0,
        ge=0,
        description="sample from this number of most likely tokens; 0: all tokens. Above 0, the answers come from "
        "another distribution than the one that is trained",
    )
    stop: list[Annotated[Str, Field(min_length=1)]] = Field(
        [], description="texts that end an answer, in addition to the end tokens of the model"
    )
    max_sequences: Int = Field(
        256,
        ge=1,
        description="number of answers that a data-parallel rank works on at the same time (with "
        "parallel.context: each of its context-parallel ranks); with the engine vllm also that of a server",
    )
    cache_gib: Float = Field(
        4.0,
        gt=0,
        description="memory in GiB for keys and values on a rank, or on each device of a server of vLLM. An answer of "
        "the engine megatron reserves memory for its longest length; if it does not suffice for max_sequences answers, "
        "fewer are worked on",
    )
    replace_flat: Int | None = Field(
        None,
        ge=0,
        description="how many times in a step groups whose answers all got the same reward are replaced by new prompts "
        "(dynamic sampling); 0: they are kept. null: 4 for align.loss dapo, otherwise 0",
    )
    ahead: Int = Field(
        0,
        ge=0,
        description="number of batches that are sampled ahead of the one that is learned, by an engine that works "
        "beside the trainer. Their answers are at most this number of steps older than the weights that learn from "
        "them; align.correction corrects for it. 0: sampling and learning take turns",
    )
    batch_invariant: Bool = Field(
        False,
        description="whether sampling and training compute each token in the same order of operations, whatever else "
        "is in the batch, so that their log-probabilities have the same bits. Very slow; for tests on one process",
    )
    log_every: Int = Field(
        10, ge=1, description="number of steps between those whose sampled answers are shown in the report and logged"
    )

    @field_validator("temperature")
    @classmethod
    def _computable(cls, temperature: float) -> float:
        if temperature < 1e-3:
            raise UserError("the logits divided by it may be infinite", "set a temperature of at least 0.001")
        return temperature

    @model_validator(mode="after")
    def _of_the_engine(self) -> "RolloutSettings":
        """Raises UserError for a setting of the other engine, which would be ignored."""
        given = [f"rollout.vllm.{name}" for name in type(self.vllm).model_fields if self.vllm.is_changed(name)]
        given += ["rollout.partial"] * self.is_changed("partial")
        if self.engine == "megatron" and given:
            raise UserError(
                f"{given[0]} is set, but rollout.engine is megatron: it would be ignored",
                f"remove {given[0]}, or set rollout.engine to vllm",
            )
        if self.is_changed("partial") and not self.ahead:
            raise UserError(
                f"rollout.partial is {self.partial}, but rollout.ahead is 0, so that no answer is being sampled when "
                "new weights come: it would be ignored",
                "remove rollout.partial, or set rollout.ahead",
            )
        if self.engine == "vllm" and self.batch_invariant:
            raise UserError(
                "rollout.batch_invariant is true, but rollout.engine is vllm, which does not have it",
                "remove rollout.batch_invariant, or set rollout.engine to megatron",
            )
        if self.engine == "vllm" and self.temperature < _LEAST_OF_VLLM:
            raise UserError(
                f"rollout.temperature is {self.temperature:g}, but vLLM would sample at {_LEAST_OF_VLLM:g}",
                f"set a temperature of at least {_LEAST_OF_VLLM:g}, or rollout.engine to megatron",
            )
        return self
