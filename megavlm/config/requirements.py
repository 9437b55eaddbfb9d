"""What a verb needs in addition to valid settings: keys that must be set."""

from collections.abc import Iterable
from operator import attrgetter

from megavlm.base.errors import UserError
from megavlm.config import describe
from megavlm.config.settings import Settings


def required[T](value: T | None, key: str) -> T:
    """Returns the value of a setting that may be null in a file, but that this verb requires.

    ``check_required`` has refused a null with a message for the user before the run started.
    (For a union such as ``Path | str``, mypy cannot infer the type: write an assert.)
    """
    assert value is not None, f"{key} must be set"
    return value


def check_required(settings: Settings, keys: Iterable[str], verb: str) -> None:
    """Raises a UserError that names those of the dotted `keys` that `verb` needs but that are null or empty.

    Of keys with "|" between them, one must be set.
    """
    meanings = {entry.key: entry.meaning for entry in describe.entries()}
    has = lambda key: attrgetter(key)(settings) not in (None, [])
    alternatives = [key.split("|") for key in keys]
    lacking = [several for several in alternatives if not any(map(has, several))]
    missing = [several[0] for several in lacking]
    if missing:
        described = [" or ".join(f"{key} ({describe.brief(meanings[key])})" for key in several) for several in lacking]
        listed = described[0] if len(missing) == 1 else "\n  ".join(["these settings:", *described])
        them = "it" if len(missing) == 1 else "them"
        examples = {"model.load": settings.model.hf}
        example = " ".join(f"{key}={examples.get(key, '…')}" for key in missing)
        raise UserError(f"{verb} needs {listed}", f"set {them} in the file or on the command line: {example}")
