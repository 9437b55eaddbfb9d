"""What the page of a run says of its data and its continuations: passes over each source, changed settings."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.monitor.metrics import read_lines
from megavlm.output.folder import CHANGES_FILE

_PASSES = "epoch/"
_FIELDS = {"step", "time", "setting", "old", "new"}  # of a change


def passes_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The passes over each source that the lines of metrics.jsonl tell of, by its name; {} if they tell of none.

    A source that was taken out of the blend keeps the passes that it had.
    """
    passes: dict[str, float] = {}
    for line in lines:
        passes |= {key.removeprefix(_PASSES): value for key, value in line.items() if key.startswith(_PASSES)}
    return {name: value for name, value in passes.items() if value is not None}


def changes_of(folder: Path) -> list[dict[str, Any]]:
    """The changes with which a run was continued, oldest first: step, time, setting, old, new.

    Lines that are damaged are left out, as the last one may be after a kill; all, if the file cannot be read.
    """
    with suppress(UserError):
        return [line for line in read_lines(folder / CHANGES_FILE) if line.keys() >= _FIELDS]
    return []
