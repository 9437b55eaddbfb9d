"""The adapter section: small weights beside frozen linears, in peft's terms."""

import re
from typing import Literal

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, Count, Float, Int, Positive, Section, Str

_ONLY = {  # fields that belong to some types alone
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
    "rslora": ("lora", "dora"),
    "dropout": ("lora", "dora"),
    "rank_pattern": ("lora", "dora"),
    "alpha_pattern": ("lora", "dora"),
    "frequencies": ("fourierft",),
    "scaling": ("fourierft",),
    "seed": ("fourierft",),
    "targets": ("lora", "dora", "fourierft"),
    "quantize": ("lora", "dora", "fourierft"),
}


class AdapterSettings(Section):
    """Adapters. The parts that they are in do not learn otherwise."""

    type: Literal["lora", "dora", "fourierft"] | None = Field(
        None,
        description="lora (2106.09685); dora (2402.09353): with the rows' lengths apart; fourierft (2405.03003): a "
        "sparse spectrum; null: none",
    )
    targets: list[Str] | None = Field(
        None,
        min_length=1,
        description="linears that get one, by the ends of their Hugging Face names: [q_proj, v_proj, attn.qkv]; null: "
        "all of the decoder, experts too (not with dora and fourierft). Parts without any learn as a whole, unless "
        "model.freeze has them",
    )
    rank: Int = Field(16, ge=1, description="of lora and dora: inner width")
    alpha: Float = Field(32.0, gt=0, description="of lora and dora: the product of the two is scaled by alpha / rank")
    rslora: Bool = Field(False, description="of lora and dora: scale by alpha / √rank instead (2312.03732)")
    dropout: Float = Field(0.0, ge=0, lt=1, description="of lora and dora: share of a linear's inputs hidden from it")
    rank_pattern: dict[Str, Count] = Field(
        {}, description="of lora and dora: other ranks, by regular expressions for the ends of names: {o_proj: 4}"
    )
    alpha_pattern: dict[Str, Positive] = Field({}, description="of lora and dora: other alphas, likewise")
    frequencies: Int = Field(1000, ge=1, description="of fourierft: numbers that are learned for each linear")
    scaling: Float = Field(150.0, gt=0, description="of fourierft: factor of the change")
    seed: Int = Field(777, ge=0, description="of fourierft: draws which frequencies")
    quantize: Literal["nf4", "nf4_double"] | None = Field(
        None,
        description="nf4 (2305.14314): the decoder's linears in 4 bits, with a float32 for 64 (where a rank's rows "
        "are no multiple of 64, rounding depends on parallel.tensor); nf4_double: those in 8 bits, too (always does); "
        "null: in train.precision",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterSettings":
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"adapter has the pattern {pattern!r}: {error}", "write a regular expression") from None
        for name, types in _ONLY.items():
            if self.type not in types and self.is_changed(name):
                raise UserError(
                    f"adapter.{name} is {getattr(self, name)}, but adapter.type is {self.type or 'null'}: "
                    "it would be ignored",
                    f"remove {name}, or choose adapter.type {' or '.join(types)}",
                )
        return self
