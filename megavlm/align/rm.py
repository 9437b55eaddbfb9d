"""`megavlm rm`: a reward model out of pairs of answers (Bradley–Terry)."""

from megavlm.align.method import PreferenceMethod, check
from megavlm.align.objectives import RewardObjective
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.loop import train


def method(settings: Settings) -> PreferenceMethod:
    """Raises UserError for settings that are not for it."""
    check(settings, "rm")
    for name in type(settings.align).model_fields:
        if name != "centering" and settings.align.is_changed(name):
            raise UserError(f"align.{name} is not for rm, which would ignore it", "remove it")
    if "language" in settings.train.thaw:
        raise UserError(
            f"train.thaw is {settings.train.thaw}, but the reward head learns from the first step on, and language is "
            "one part with it",
            "remove language from train.thaw; train with it frozen first, then start from that run (model.load)",
        )

    def make(s: Settings, groups) -> RewardObjective:
        return RewardObjective(s.align.centering, groups, sequence_parallel=s.parallel.sequence_parallel)

    return PreferenceMethod("pair", "reward model", make, scores=True)


def main(settings: Settings) -> int:
    return train(settings, method(settings))
