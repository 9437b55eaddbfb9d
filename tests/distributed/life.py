"""The life of a run as a table: how it may be interrupted, how it may be started again, and what then happens.

``test_life.py`` tries it, and checks that docs/runs.md contains ``table()``.
"""

import signal
from dataclasses import dataclass

STEPS, LONGER, EVERY = 4, 5, 2  # steps of the run and of the longer one, and between checkpoints


@dataclass(frozen=True)
class Interruption:
    """How a start ends.

    Attributes:
        status: its exit status in words.
        kept: the checkpoint from which the run continues, in words; None if there was no earlier start.
        number: the signal that interrupts it, if one does.
        at_step: the step at which the signal is sent.
        overrides: settings of this start that are not those of the next.
    """

    status: str
    kept: str | None
    number: int | None = None
    at_step: int = 0
    overrides: tuple[str, ...] = ()


INTERRUPTIONS = {
    "nothing (a new run)": Interruption("", None),
    "Ctrl-C": Interruption("0", "of the step that it finished", signal.SIGINT, 1),
    "SIGTERM": Interruption("0", "of the step that it finished", signal.SIGTERM, 1),
    "kill -9": Interruption("that of the signal", "the newest", signal.SIGKILL, 3),
    "broken data": Interruption("2", "the newest", overrides=("data.max_bad_fraction=0",)),
    "a full disk": Interruption("2", "the newest"),
}

SAME, NUMBERS, REFUSED = "same bits", "same numbers", "refused without `--change train.lr`"
# What the next start is given, and what becomes of the run: see the text above the table in docs/runs.md.
CONTINUATIONS = {
    "the same settings": ((), SAME),
    "more `train.steps`": ((f"train.steps={LONGER}",), SAME),
    "another `train.lr`": (("train.lr=2e-4",), REFUSED),
    "another layout": (("parallel.tensor=2",), NUMBERS),
    "`overwrite: true`": (("overwrite=true",), SAME),
}


def outcome(interruption: str, continuation: str) -> str:
    """What becomes of the run: one of the results above. A new run is never refused."""
    result = CONTINUATIONS[continuation][1]
    return SAME if result == REFUSED and INTERRUPTIONS[interruption].kept is None else result


def table() -> str:
    """The table in Markdown."""
    rows = [["interrupted by", "exit status", "continues from", *CONTINUATIONS], ["---"] * (3 + len(CONTINUATIONS))]
    for name, interruption in INTERRUPTIONS.items():
        outcomes = [outcome(name, continuation) for continuation in CONTINUATIONS]
        rows.append([name, interruption.status or "—", interruption.kept or "—", *outcomes])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
