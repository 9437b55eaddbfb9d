"""Groups of weights that are trained in their own way."""

import re

from pydantic import Field, ValidationInfo, field_validator

from megavlm.base.errors import UserError
from megavlm.config.section import Bool, Float, Positive, Section, Str


class GroupSettings(Section):
    """Weights that are trained with another learning rate or weight decay, or not at all."""

    match: Str = Field(
        min_length=1,
        description="regular expression that is searched in the Hugging Face names of the weights, for example "
        r"language_model\.layers\.[0-3]\. or embed_tokens; a weight belongs to the first group that matches",
    )
    lr_scale: Positive = Field(1.0, description="factor of the learning rate, beside train.lr_scale of the part")
    weight_decay: Float | None = Field(
        None, ge=0, le=1000, description="weight decay of the group; null: train.weight_decay"
    )
    freeze: Bool = Field(
        False,
        description="whether the weights of the group are not trained; routers that are not have no load-balancing "
        "loss and no z-loss",
    )

    @field_validator("match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"match is not a regular expression: {error}", "write a regular expression") from None
        return match

    @field_validator("freeze")
    @classmethod
    def _nothing_beside(cls, freeze: bool, info: ValidationInfo) -> bool:
        beside = [name for name in ("lr_scale", "weight_decay") if info.data.get(name) not in (1.0, None)]
        if freeze and beside:
            raise UserError(
                f"the group is frozen, but has {beside[0]}, which would be ignored", f"remove {beside[0]} or freeze"
            )
        return freeze
