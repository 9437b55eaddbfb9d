"""Rewords what argparse says about a wrong command line: what is missing or wrong, and what to write instead."""

import difflib
import re
from collections.abc import Sequence

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.cli.verb import Verb
from megavlm.config import describe


def wrong(name: str, verb: Verb, message: str) -> UserError:
    """The error for a command line of the verb ``name`` that argparse has refused with ``message``."""
    command, see = f"megavlm {name}", f"megavlm {name} --help lists everything that it takes"
    kind, _, listed = message.partition(": ")
    if kind == "the following arguments are required":
        if "CONFIG.yaml" in listed.split(", "):
            return UserError(
                f"{command} needs a configuration file",
                f"{command} CONFIG.yaml [section.key=value …]; {see}",
            )
        needed = [spelled(flag, verb) for flag in listed.split(", ")]
        return UserError(f"{command} needs {' and '.join(needed)}", f"example: {verb.example.splitlines()[0]}")
    if kind == "unrecognized arguments":
        return UserError(f"{command} does not take {shortened(listed)}", _instead(listed.split(), verb) or see)
    flag = kind.removeprefix("argument ").split("/")[0]
    if listed.startswith("expected "):
        return UserError(f"{command}: {flag} needs a value", f"write {spelled(flag, verb)}")
    return UserError(f"{command}: {kind}: {listed}" if listed else f"{command}: {message}", see)


def spelled(flag: str, verb: Verb) -> str:
    """A flag with its value, if it takes one: --out DIR."""
    options = verb.flags.get(flag.removeprefix("--").replace("-", "_"), {})
    return f"{flag} {options['metavar']}" if "metavar" in options else f"{flag} N" if flag == "--nproc" else flag


def _instead(words: Sequence[str], verb: Verb) -> str | None:
    """What was probably meant by arguments that the verb does not know."""
    word, _, value = words[0].partition("=")
    if not word.startswith("--"):
        return None
    flags = ["--" + keyword.replace("_", "-") for keyword in verb.flags] + ["--nproc"] * verb.local_workers
    if close := difflib.get_close_matches(word, flags, n=1, cutoff=0.75):
        return f"did you mean {spelled(close[0], verb)}?"
    value = value or (words[1] if len(words) > 1 else "VALUE")
    bare = word.removeprefix("--").replace("-", "_")
    keys = [entry.key for entry in describe.entries()] if verb.sections else []
    if found := [key for key in keys if key == bare or re.search(rf"\.{re.escape(bare)}$", key)]:
        return f"settings are written without dashes: {found[0]}={value}"
    return None
