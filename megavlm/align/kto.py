"""`megavlm kto`: preference tuning on single answers that are labelled desirable or undesirable (2402.01306)."""

from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.align.objectives import JudgedObjective
from megavlm.align.preference_method import PreferenceMethod, check, check_reference
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.start_weights import StartWeights

BETA = 0.1
_USED = {"beta", "desirable_weight", "undesirable_weight", "reference", "reference_at"}


def method(settings: Settings) -> PreferenceMethod:
    """Makes the method. Raises UserError for settings that kto does not use."""
    check(settings, "kto")
    check_reference(settings, "kto")
    align = settings.align
    if align.beta == 0:
        raise UserError("align.beta is 0, which is only for grpo", "set align.beta above 0")
    for name in type(align).model_fields:
        if name not in _USED and align.is_changed(name):
            raise UserError(f"align.{name} is not used by kto, so it would be ignored", f"remove align.{name}")

    def make(s: Settings, groups: ProcessGroupCollection, start: StartWeights | None) -> JudgedObjective:
        beta = BETA if align.beta is None else align.beta
        weights = (align.desirable_weight, align.undesirable_weight)
        return JudgedObjective(beta, *weights, s.train.logprob_chunk_tokens, groups, start)

    return PreferenceMethod("judged", "preference tuning · KTO", make, has_reference=True)
