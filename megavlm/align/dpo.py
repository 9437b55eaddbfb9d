"""`megavlm dpo`: preference tuning on pairs of answers, with the loss of DPO or a related one (``align.loss``)."""

from megavlm.align.losses import PREFERENCE_LOSSES, check_preference
from megavlm.align.objectives import PairObjective
from megavlm.align.preference_method import PreferenceMethod, check, check_reference
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings

LOSS = "sigmoid"
"""The loss if ``align.loss`` is null."""


def options_of(settings: Settings) -> dict[str, float]:
    """Returns the options of the loss that are set. Raises UserError if an option or setting is not for this loss."""
    align = settings.align
    known = {name for loss in PREFERENCE_LOSSES.values() for name in loss.options}
    options = {key: value for key in sorted(known) if (value := getattr(align, key)) is not None}
    name = align.loss or LOSS
    if align.beta == 0:
        raise UserError("align.beta is 0, which is only for grpo", "set align.beta above 0")
    try:
        loss = check_preference(name, options)
    except ValueError as error:
        raise UserError(f"align: {error}") from None
    if align.reference is not None and not loss.reference:
        raise UserError(
            f"align.reference is {align.reference}, but align.loss is {name}, which has no reference model: the "
            "setting would be ignored",
            "remove align.reference",
        )
    if align.is_changed("reference_at") and not loss.reference:
        raise UserError(
            f"align.reference_at is set, but align.loss is {name}, which has no reference model: the setting "
            "would be ignored",
            "remove align.reference_at",
        )
    if name == "orpo" and align.sft_weight:
        raise UserError(
            f"align.sft_weight is {align.sft_weight:g}, but align.loss is orpo, which has this term already",
            "remove align.sft_weight; align.lam sets the weight of the other term",
        )
    for key in type(align).model_fields:
        if key not in {"loss", "reference", "reference_at", "sft_weight", *known} and align.is_changed(key):
            raise UserError(f"align.{key} is not used by dpo, so it would be ignored", f"remove align.{key}")
    return options


def method(settings: Settings) -> PreferenceMethod:
    """Makes the method. Raises UserError for settings that dpo does not use."""
    check(settings, "dpo")
    options = options_of(settings)
    loss = settings.align.loss or LOSS
    has_reference = PREFERENCE_LOSSES[loss].reference
    if has_reference:
        check_reference(settings, f"dpo with align.loss {loss}")
    make = lambda s, groups, start: PairObjective(
        loss, options, s.train.logprob_chunk_tokens, groups, start, s.align.sft_weight
    )
    return PreferenceMethod("pair", f"preference tuning · {loss}", make, has_reference=has_reference)
