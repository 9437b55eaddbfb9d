"""What a training run would do with the output folder of a configuration, for `megavlm validate`."""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.output.changes import listed
from megavlm.output.folder import StartOptions, changed_keys, check_unlocked, newest_step, plan_start


@dataclass(frozen=True)
class Found:
    """What is in the output folder.

    Attributes:
        settings: the settings of the run; of one that is continued, with the length that its schedule has.
        words: what a run would do; "" without an output folder.
    """

    settings: Settings
    words: str


def found_in(settings: Settings, change: Sequence[str] = ()) -> Found:
    """What a training run with ``--change`` of these keys would do. Raises UserError if ``change`` would be ignored."""
    if settings.output is None:
        if change:
            raise UserError(f"--change {change[0]}: no output is set, so there is no run", "set output to its folder")
        return Found(settings, "")
    try:
        start = plan_start(settings, StartOptions(change=tuple(change)))
        check_unlocked(settings)
    except UserError as error:
        return Found(settings, f"a run would be refused: {error}")
    except OSError as error:
        return Found(settings, f"a run would be refused: {error.strerror}")
    words = {
        "new": "new",
        "resume": f"continues after step {newest_step(required(settings.output, 'output'))}",
        "again": "begins again, because there is no checkpoint yet",
        "replace": "replaces what is there, because overwrite is true",
    }[start.action]
    if start.action != "resume":
        return Found(settings, words)
    changed = changed_keys(start.before, start.settings) if start.before is not None else {}
    return Found(start.settings, f"{words}{', with changed settings:' + listed(changed) if changed else ''}")
