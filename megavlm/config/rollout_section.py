"""The rollout section: how answers are sampled in reinforcement learning."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, Float, Int, Section, Str


class RolloutSettings(Section):
    """How answers are sampled in reinforcement learning (grpo and ppo)."""

    engine: Literal["megatron"] = Field(
        "megatron", description="what samples the answers. megatron: the weights that are trained, in their own layout"
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
        "parallel.context: each of its context-parallel ranks)",
    )
    cache_gib: Float = Field(
        4.0,
        gt=0,
        description="memory in GiB for keys and values on a rank. An answer reserves memory for its longest length; "
        "if it does not suffice for max_sequences answers, fewer are worked on",
    )
    replace_flat: Int | None = Field(
        None,
        ge=0,
        description="how many times in a step groups whose answers all got the same reward are replaced by new prompts "
        "(dynamic sampling); 0: they are kept. null: 4 for align.loss dapo, otherwise 0",
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
