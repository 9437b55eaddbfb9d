"""What a verb of the command is: its arguments, the settings and files that it reads, and what it writes."""

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

from megavlm.align.registry import METHODS

RUN = ("model", "adapter", "data", "parallel", "vision", "train", "eval", "checkpoint", "log", "generate")
READS = ("model.hf", "model.load", "model.adapter")


FOR: dict[str, Any] = {
    "metavar": "VERB",
    "dest": "verb",
    "choices": tuple(METHODS),
    "help": "the verb that is to read the data; default: a guess from the settings and the data, which is said",
}


def positive(text: str) -> int:
    """The argparse type of a number that is at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def natural(text: str) -> int:
    """The argparse type of a number that is at least 0."""
    return 0 if text == "0" else positive(text)


def at_least_one(text: str) -> float:
    """Parses a number of at least 1, such as how uneven something is."""
    value = amount(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def amount(text: str) -> float:
    """Parses a number of at least 0, such as a price."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Attributes:
        target: "module:function", imported when the verb is run. The function is called with the settings, if the verb
            has sections, and one keyword argument per positional and flag. It returns an exit status or None for 0.
        summary: one line for the list of verbs.
        example: command lines for its help.
        sections: the sections or single keys of the settings that it reads; () if it takes no CONFIG.yaml.
        requires: keys that must be set because they have no usable default.
        reads: keys of files that must exist.
        writes: result file or folder below `output` that must not exist yet; "" for a run folder; None for nothing.
        positionals: arguments in addition to CONFIG.yaml: {keyword: argparse options}.
        flags: options of this verb: {keyword: argparse options}; `--image` is keyword `image`.
        settings: those of the flags that are another way to write a setting: {keyword: key of the setting}.
        local_workers: whether it accepts --nproc.
        uses_run: whether it reads the weights of the run in `output`, if there is one (`megavlm.output.held_run`).
        reads_terminal: whether rank 0 reads from standard input, also with --nproc.
        fixed: further keyword arguments, the same in each call.
    """

    target: str
    summary: str
    example: str
    sections: tuple[str, ...] = RUN
    requires: tuple[str, ...] = ()
    reads: tuple[str, ...] = READS
    writes: str | None = None
    positionals: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    local_workers: bool = True
    uses_run: bool = False
    reads_terminal: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)
