"""`megavlm kto`: preference tuning on single answers that are labelled desirable or undesirable (2402.01306)."""

from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.align.objectives import JudgedObjective
from megavlm.align.preference_method import PreferenceMethod, check, check_reference
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.start_weights import StartWeights

BETA = 0.1


def method(settings: Settings) -> PreferenceMethod:
    """Makes the method. Raises UserError for settings that kto does not use."""
    check(settings, "kto")
    check_reference(settings, "kto")
    align = settings.align
    for name in ("loss", "gamma", "label_smoothing", "lam", "centering"):
        if align.is_changed(name):
            raise UserError(f"align.{name} is not used by kto, so it would be ignored", f"remove align.{name}")

    def make(s: Settings, groups: ProcessGroupCollection, start: StartWeights | None) -> JudgedObjective:
        beta = BETA if align.beta is None else align.beta
        weights = (align.desirable_weight, align.undesirable_weight)
        return JudgedObjective(beta, *weights, s.train.logprob_chunk_tokens, groups, start)

    return PreferenceMethod("judged", "preference tuning · KTO", make, has_reference=True)
