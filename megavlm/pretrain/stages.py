"""`megavlm pretrain`: projector → all weights → 32K → 262K context, each from the checkpoint of the one before.

A stage is a recipe (configs/pretrain): what is frozen, how long a row is, the learning rate and its schedule. The code
of all four is the same; this file knows only what would make a recipe something else than its stage.
"""

from megavlm.config.errors import UserError
from megavlm.config.settings import Settings
from megavlm.training.loop import train

NAMES = ("alignment", "all weights", "long context", "ultra-long context")


def main(settings: Settings) -> int:
    """Runs stage ``settings.stage``. Raises UserError where the settings contradict the stage."""
    check(settings)
    return train(settings, "pretrain", f"pretrain · stage {settings.stage}, {NAMES[settings.stage]}")


def check(settings: Settings) -> None:
    """Stage 0 trains the projector alone; later stages start from a checkpoint."""
    frozen = set(settings.model.freeze)
    if settings.stage == 0 and frozen != {"vision", "language"}:
        raise UserError(
            f"stage is 0, which trains the projector alone, but model.freeze is {sorted(frozen)}",
            "set model.freeze: [vision, language], or choose stage 1",
        )
    if settings.stage > 0 and settings.model.load is None:
        raise UserError(
            f"stage is {settings.stage}, which continues stage {settings.stage - 1}, but model.load is not set",
            "set model.load to the output folder, or a checkpoint, of the stage before",
        )
