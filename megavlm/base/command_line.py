"""The configuration of the running command, for messages that name another command."""

import shlex
from collections.abc import Sequence

_given: list[str] = ["CONFIG.yaml"]


def remember(config: object, overrides: Sequence[str]) -> None:
    """Keeps the path of the configuration and the overrides with which the command was started."""
    _given[:] = [str(config), *overrides]


def command(verb: str, *more: str) -> str:
    """`megavlm VERB` with the configuration of the running command, as it can be typed into a shell."""
    return shlex.join(["megavlm", *verb.split(), *_given, *more])


def given() -> tuple[str, list[str]]:
    """The path of the configuration of the running command, and its overrides."""
    return _given[0], _given[1:]
