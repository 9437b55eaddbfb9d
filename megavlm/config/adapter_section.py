"""The adapter section: small trained weights beside frozen linear layers, with the settings that peft has."""

import re
from typing import Literal

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Bool, Count, Float, Int, Positive, Section, Str

_ONLY = {  # the types to which a field applies
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
    "rslora": ("lora", "dora"),
    "dropout": ("lora", "dora"),
    "rank_pattern": ("lora", "dora"),
    "alpha_pattern": ("lora", "dora"),
    "lr_ratio": ("lora", "dora"),
    "frequencies": ("fourierft",),
    "scaling": ("fourierft",),
    "seed": ("fourierft",),
    "modules_to_save": ("lora", "dora", "fourierft"),
    "targets": ("lora", "dora", "fourierft"),
    "quantize": ("lora", "dora", "fourierft"),
}


class AdapterSettings(Section):
    """Adapters: small trained weights beside frozen linear layers. In a part that has adapters, only they are trained.

    The numbers in brackets are papers on arXiv.
    """

    type: Literal["lora", "dora", "fourierft"] | None = Field(
        None,
        description="kind of adapter. lora: low-rank matrices (2106.09685); dora: low-rank matrices and a separate "
        "magnitude for each row of the weight (2402.09353); fourierft: a sparse spectrum (2405.03003); null: no "
        "adapter",
    )
    targets: list[Str] | None = Field(
        None,
        min_length=1,
        description="linear layers that get an adapter, given by the ends of their Hugging Face names, for example "
        "[q_proj, v_proj, attn.qkv]; null: all linear layers of the decoder (experts with lora only). A part without "
        "adapters is trained in full unless model.freeze names it",
    )
    modules_to_save: list[Str] = Field(
        [],
        description="modules that are trained as a whole beside the adapters and saved with them, as in peft, given by "
        "the ends of their Hugging Face names, for example [embed_tokens, lm_head]. They must be in parts that have "
        "adapters",
    )
    rank: Int = Field(16, ge=1, description="only for lora and dora: rank of the adapter matrices")
    alpha: Float = Field(
        32.0, gt=0, description="only for lora and dora: the product of the adapter matrices is scaled by alpha / rank"
    )
    rslora: Bool = Field(
        False,
        description="only for lora and dora: whether to scale by alpha / √rank instead (rank-stabilised LoRA, "
        "2312.03732)",
    )
    dropout: Float = Field(
        0.0, ge=0, lt=1, description="only for lora and dora: dropout probability of the input of an adapter"
    )
    rank_pattern: dict[Str, Count] = Field(
        {},
        description="only for lora and dora: rank of single layers. A key is a regular expression for the end of a "
        "layer's name, for example {o_proj: 4}",
    )
    alpha_pattern: dict[Str, Positive] = Field(
        {}, description="only for lora and dora: alpha of single layers, with keys as in rank_pattern"
    )
    lr_ratio: Positive = Field(
        1.0,
        description="only for lora and dora: how many times faster the matrices B learn than A (LoRA+, 2402.12354, "
        "which takes 16)",
    )
    frequencies: Int = Field(
        1000, ge=1, description="only for fourierft: number of trained coefficients per linear layer"
    )
    scaling: Float = Field(
        150.0, gt=0, description="only for fourierft: factor by which the weight change is multiplied"
    )
    seed: Int = Field(777, ge=0, description="only for fourierft: seed that selects which frequencies are trained")
    quantize: Literal["nf4", "nf4_double"] | None = Field(
        None,
        description="number format of the decoder's frozen linear layers. nf4: 4 bits per weight and a float32 scale "
        "for each 64 weights (2305.14314); nf4_double: the same with the scales in 8 bits; null: the format of "
        "train.precision. The rounding depends on parallel.tensor: always with nf4_double, and with nf4 if the weight "
        "rows on a rank have a length that is not a multiple of 64",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterSettings":
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"adapter.{name} has the key {quoted(pattern)}, which is not a regular expression: {error}",
                        "write a regular expression",
                    ) from None
        for name, types in _ONLY.items():
            if self.type not in types and self.is_changed(name):
                raise UserError(
                    f"adapter.{name} is {getattr(self, name)}, but adapter.type is {self.type or 'null'}: "
                    "it would be ignored",
                    f"remove {name}, or choose adapter.type {' or '.join(types)}",
                )
        return self
