"""Sections of ``train`` that make steps faster: FP8, overlapped communication, experts."""

from typing import Literal

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, Section

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]
FP8_BLOCKS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""By recipe, the number by which tokens and widths of a product must be divisible."""


class Fp8Settings(Section):
    """How numbers are scaled to FP8. Only for train.precision fp8."""

    recipe: Literal["blockwise", "tensorwise", "delayed", "mxfp8"] = Field(
        "blockwise",
        description="what shares a scale. blockwise: blocks of 128 numbers or of 128 × 128 weights; tensorwise: a "
        "tensor, from its own largest number; delayed: a tensor, from the largest numbers of earlier steps, which a "
        "continued run must collect anew; mxfp8: blocks of 32 numbers, which needs a Blackwell GPU",
    )
    tower: Bool = Field(
        False, description="whether the vision tower computes in FP8, too; otherwise only the decoder does"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Fp8Settings":
        if self.tower and self.recipe == "delayed":
            raise UserError(
                "train.fp8.tower is true, but train.fp8.recipe is delayed: its scales are exchanged after each pass, "
                "and ranks encode different numbers of frames",
                "choose recipe blockwise or tensorwise",
            )
        return self


class OverlapSettings(Section):
    """Which communication runs while the GPU computes."""

    gradients: Bool = Field(
        True,
        description="whether the decoder's gradients are summed over the data-parallel ranks during the backward pass "
        "of the last micro-batch, in pieces; without effect on adapters",
    )
    weights: Bool = Field(
        False,
        description="whether the decoder's updated weights are gathered over the data-parallel ranks while the next "
        "step begins, in pieces; needs overlap.gradients and train.optimizer adam; without effect on adapters, grpo "
        "and ppo",
    )
    tensor: Bool = Field(
        False,
        description="whether tensor parallelism sends pieces of a matrix product while the next piece is computed "
        "(Transformer Engine's userbuffers); needs model.kernels te, parallel.tensor above 1 and parallel.sequence",
    )


class ExpertSettings(Section):
    """How tokens reach their experts. Only for mixture-of-experts models."""

    dispatcher: Literal["alltoall", "deepep", "hybridep"] = Field(
        "alltoall",
        description="how tokens are sent to the ranks of their experts. alltoall: NCCL; deepep, hybridep: the kernels "
        "of the package deep_ep, which must be installed",
    )
    fused_router: Bool = Field(
        False, description="whether softmax and choice of experts are one kernel (Transformer Engine's)"
    )
