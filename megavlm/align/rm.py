"""`megavlm rm`: trains a reward model on pairs of answers (Bradley–Terry)."""

from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.align.objectives import RewardObjective
from megavlm.align.preference_method import PreferenceMethod, check
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.start_weights import StartWeights


def method(settings: Settings) -> PreferenceMethod:
    """Makes the method. Raises UserError for settings that rm does not use."""
    check(settings, "rm")
    for name in type(settings.align).model_fields:
        if name != "centering" and settings.align.is_changed(name):
            raise UserError(f"align.{name} is not used by rm, so it would be ignored", f"remove align.{name}")
    if "language" in settings.train.unfreeze_after:
        raise UserError(
            f"train.unfreeze_after is {settings.train.unfreeze_after}, but the reward head, which "
            "belongs to the part language, is trained from the first step on",
            "remove language from train.unfreeze_after; run once with language frozen, then start from that run",
        )

    def make(s: Settings, groups: ProcessGroupCollection, start: StartWeights | None) -> RewardObjective:
        return RewardObjective(s.align.centering, groups, sequence_parallel=s.parallel.sequence_parallel)

    return PreferenceMethod("pair", "reward model", make, has_reference=False, scores=True)
