"""Says how a start continues the run in the output folder: changed settings, and what becomes of the learning rate."""

from megavlm.optim.optimizers import Optimizers
from megavlm.output.changes import text
from megavlm.output.folder import Start

_SCHEDULE = (
    *("train.lr", "train.min_lr", "train.warmup_steps", "train.warmup_share", "train.schedule", "train.schedule_steps"),
    *("train.restarts", "train.decay_share", "train.decay_shape", "train.schedule_table"),
)
_ENDING = ("cosine", "linear", "wsd")  # schedules that fall to min_lr


def remarks_on(start: Start, optimizers: Optimizers, step: int) -> list[str]:
    """What the user should know about this start, one sentence or two each.

    Args:
        start: what the start does with the output folder.
        optimizers: the optimizers after the run was restored.
        step: the number of steps that the run has done.
    """
    if start.action == "again":
        return ["there is no checkpoint yet, so the run starts again at step 0"]
    before, train = start.before, start.settings.train
    if before is None:
        return []
    said = [
        f"from step {step + 1} on, {key} is {text(new)} (it was {text(old)})"
        for key, (old, new) in start.changed.items()
    ]
    now, old = optimizers.lr, optimizers.lr_with(before.train)
    if any(key.startswith(_SCHEDULE) for key in start.changed):
        said.append(f"the learning rate of step {step + 1} is {now:.3g}; with the settings before it was {old:.3g}")
    falls = train.schedule in _ENDING
    if falls and train.steps is not None and "train.steps" in start.changed and train.schedule_steps != train.steps:
        other = optimizers.lr_with(train.model_copy(update={"schedule_steps": train.steps}))
        said.append(
            f"the schedule of this run has {train.schedule_steps} steps: the learning rate of step {step + 1} is "
            f"{now:.3g}, and after the end of the schedule it stays at train.min_lr = {train.min_lr:g}. A schedule of "
            f"{train.steps} steps would set it to {other:.3g}: train.schedule_steps={train.steps} --change "
            "train.schedule_steps"
        )
    if falls and train.epochs is not None and "train.epochs" in start.changed:
        said.append(
            f"the schedule of this run has {train.schedule_steps} steps, after which the learning rate stays at "
            f"train.min_lr = {train.min_lr:g}: train.schedule_steps=N --change train.schedule_steps gives it another "
            "length"
        )
    return said
