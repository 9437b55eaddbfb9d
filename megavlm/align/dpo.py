"""`megavlm dpo`: tuning on pairs of answers, by DPO and its relatives (``align.loss``)."""

from megavlm.align.losses import check_preference
from megavlm.align.objectives import PairObjective
from megavlm.align.preference_method import PreferenceMethod, check
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.loop import train

OPTIONS = ("beta", "gamma", "label_smoothing", "lam")


def options_of(settings: Settings) -> dict[str, float]:
    """The loss's options that are set. Raises UserError for one that the loss does not have."""
    align = settings.align
    options = {name: getattr(align, name) for name in OPTIONS if getattr(align, name) is not None}
    try:
        loss = check_preference(align.loss, options)
    except ValueError as error:
        raise UserError(f"align: {error}") from None
    if align.reference is not None and not loss.reference:
        raise UserError(
            f"align.reference is {align.reference}, but align.loss {align.loss} has no reference: it would be ignored",
            "remove align.reference",
        )
    if align.is_changed("reference_at") and not loss.reference:
        raise UserError(
            f"align.reference_at is set, but align.loss {align.loss} has no reference: it would be ignored", "remove it"
        )
    for name in ("desirable_weight", "undesirable_weight", "centering"):
        if align.is_changed(name):
            raise UserError(f"align.{name} is not for dpo, which would ignore it", "remove it")
    return options


def method(settings: Settings) -> PreferenceMethod:
    """Raises UserError for settings that are not for it."""
    check(settings, "dpo")
    options = options_of(settings)
    make = lambda s, groups: PairObjective(s.align.loss, options, s.train.logprob_chunk_tokens, groups.cp)
    return PreferenceMethod("pair", f"preference tuning · {settings.align.loss}", make)


def main(settings: Settings) -> int:
    return train(settings, method(settings))
