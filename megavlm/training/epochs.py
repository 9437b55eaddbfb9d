"""Runs whose length is given in epochs: the number of steps that their schedule and their progress count on."""

from dataclasses import replace
from functools import partial

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader
from megavlm.output.folder import Start, with_schedule_steps, write_config
from megavlm.platform import Groups
from megavlm.platform.collectives import on_first_rank


def expect_steps(begin: Start, loader: RowLoader | None, groups: Groups) -> tuple[Start, list[str]]:
    """Works out at the first start of a run how many steps its epochs will have. Call it on all ranks.

    The number becomes ``train.schedule_steps`` and is written to config.yaml, so that the schedule is the same when the
    run continues. The run itself ends when the data are used up.

    Args:
        begin: what the start does.
        loader: the loader of this rank, if it reads rows.
        groups: the process groups of the run.

    Returns:
        The start with that number, and what the user should know of it.

    Raises:
        UserError: on all ranks, if the warm-up is longer.
    """
    train = begin.settings.train
    if train.epochs is None or train.schedule_steps is not None:
        return begin, []
    steps, is_exact = on_first_rank(partial(_expected, loader), groups.world_host)
    how = "" if is_exact else "about "
    length = f"train.epochs = {train.epochs:g} takes {how}{counted(steps, 'step')}"
    if train.warmup_steps > steps:  # before config.yaml is written, which could not be read again
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, but {length}", "lower warmup_steps, or use warmup_share"
        )
    begin = replace(begin, settings=with_schedule_steps(begin.settings, steps))
    if begin.action != "resume":  # otherwise it is written when the run has been restored
        on_first_rank(partial(write_config, begin), groups.world_host)
    return begin, [f"{length}: the schedule has this length", *_unreached(begin.settings, steps)]


def _unreached(settings: Settings, steps: int) -> list[str]:
    """What the settings ask for after the last of so many steps."""
    train = settings.train
    late = [f"train.unfreeze_after[{part}] = {after}" for part, after in train.unfreeze_after.items() if after >= steps]
    late += [f"train.profile, up to step {train.profile.last}"] if train.profile.last > steps else []
    ramps = {"train.batch_ramp": train.batch_ramp, "data.length_ramp": settings.data.length_ramp}
    late += [f"{name}, up to step {max(ramp)}" for name, ramp in ramps.items() if max(ramp, default=0) >= steps]
    return [f"the run may end before this: {each}" for each in late]


def _expected(loader: RowLoader | None) -> tuple[int, bool]:
    assert loader is not None, "the first rank reads rows"
    return loader.expected_steps()
