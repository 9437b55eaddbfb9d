"""`megavlm pretrain`: projector → all weights → 32K → 262K context, each from the checkpoint of the one before.

A stage is a recipe (configs/pretrain): what is frozen, how long a row is, the learning rate and its schedule. The code
of all four is the same; this file knows only what would make a recipe something else than its stage.
"""

from megavlm.config.requirements import check_stage
from megavlm.config.settings import Settings
from megavlm.training.loop import LanguageModeling, train

NAMES = ("alignment", "all weights", "long context", "ultra-long context")


def method(settings: Settings) -> LanguageModeling:
    """Of stage ``settings.stage``. Raises UserError where the settings contradict the stage."""
    check_stage(settings)
    return LanguageModeling("pretrain", f"pretrain · stage {settings.stage}, {NAMES[settings.stage]}")


def main(settings: Settings) -> int:
    return train(settings, method(settings))
