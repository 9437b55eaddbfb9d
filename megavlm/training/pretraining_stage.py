"""What a pretraining stage needs of the settings."""

from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.settings import Settings


def check_stage(settings: Settings) -> None:
    """Raises a UserError if the settings contradict ``stage``, which must be set.

    Stage 0 trains only the projector; later stages start from a checkpoint.
    """
    stage, frozen = required(settings.stage, "stage"), set(settings.model.freeze)
    if stage == 0 and frozen != {"vision", "language"}:
        raise UserError(
            f"stage is 0, which trains only the projector, but model.freeze is {sorted(frozen)}",
            "set model.freeze: [vision, language], or choose stage 1",
        )
    if stage == 0 and settings.train.unfreeze_after:
        raise UserError(
            f"stage is 0, which trains only the projector, but train.unfreeze_after is {settings.train.unfreeze_after}",
            "remove train.unfreeze_after, or choose stage 1",
        )
    if stage > 0 and settings.model.load is None:
        raise UserError(
            f"stage is {stage}, which continues stage {stage - 1}, but model.load is not set",
            "set model.load to the output folder or a checkpoint of the previous stage, or to a Hugging Face folder",
        )
