"""The section train.loss: how the losses of single targets become the loss of a step."""

from typing import Literal

from pydantic import Field

from megavlm.config.section import Float, Section


class LossSettings(Section):
    """How the losses of single targets become the loss of a step. Only for pretrain and sft."""

    per: Literal["token", "sample", "sqrt"] = Field(
        "token",
        description="how much a sample counts in the loss. token: as much as it has targets; sample: all samples the "
        "same, however long; sqrt: the square root of its number of targets, between the two (as Qwen3-VL was trained)",
    )
    z_loss: Float = Field(
        0.0,
        ge=0,
        description="coefficient of the square of the logarithm of the softmax's denominator, which keeps logits from "
        "growing; 1e-4 in PaLM; 0: no such term",
    )
    label_smoothing: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each target's probability that is spread evenly over the whole vocabulary; 0: none",
    )
