"""`megavlm dpo`: preference tuning on pairs of answers, with the loss of DPO or a related one (``align.loss``)."""

from megavlm.align.losses import PREFERENCE_LOSSES, check_preference
from megavlm.align.objectives import PairObjective
from megavlm.align.preference_method import PreferenceMethod, check, check_reference
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings


def options_of(settings: Settings) -> dict[str, float]:
    """Returns the options of the loss that are set. Raises UserError if an option or setting is not for this loss."""
    align = settings.align
    known = {name for loss in PREFERENCE_LOSSES.values() for name in loss.options}
    options = {name: value for name in sorted(known) if (value := getattr(align, name)) is not None}
    try:
        loss = check_preference(align.loss, options)
    except ValueError as error:
        raise UserError(f"align: {error}") from None
    if align.reference is not None and not loss.reference:
        raise UserError(
            f"align.reference is {align.reference}, but align.loss is {align.loss}, which has no reference model: the "
            "setting would be ignored",
            "remove align.reference",
        )
    if align.is_changed("reference_at") and not loss.reference:
        raise UserError(
            f"align.reference_at is set, but align.loss is {align.loss}, which has no reference model: the setting "
            "would be ignored",
            "remove align.reference_at",
        )
    for name in type(align).model_fields:
        if name not in {"loss", "reference", "reference_at", *known} and align.is_changed(name):
            raise UserError(f"align.{name} is not used by dpo, so it would be ignored", f"remove align.{name}")
    return options


def method(settings: Settings) -> PreferenceMethod:
    """Makes the method. Raises UserError for settings that dpo does not use."""
    check(settings, "dpo")
    options = options_of(settings)
    loss, has_reference = settings.align.loss, PREFERENCE_LOSSES[settings.align.loss].reference
    if has_reference:
        check_reference(settings, f"dpo with align.loss {loss}")
    make = lambda s, groups, start: PairObjective(loss, options, s.train.logprob_chunk_tokens, groups, start)
    return PreferenceMethod("pair", f"preference tuning · {loss}", make, has_reference=has_reference)
