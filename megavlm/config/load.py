"""Reads configuration files and overrides into checked `Settings`. Messages say what is wrong and where.

Later entries override earlier ones: defaults, the files named by `base:`, the file itself, overrides. Relative paths in
settings start from the current directory, and those in `base:` from the folder of the file that names them.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megavlm.base import yaml_files
from megavlm.base.errors import UserError
from megavlm.base.quoting import MOST, quoted, shortened
from megavlm.base.yaml_files import Location, Values
from megavlm.config import describe
from megavlm.config.renamed import RENAMED
from megavlm.config.settings import Settings


def load_settings(path: Path | str, overrides: Iterable[str] = ()) -> Settings:
    """Reads a configuration file, its bases, and overrides of the form `section.key=value`.

    Raises:
        UserError: one message that lists all problems with files, keys, types, ranges and combinations.
    """
    values = yaml_files.read_file(Path(path))
    for override in overrides:
        values.update(yaml_files.parse_override(override))
    values.tree.setdefault("model", {})  # so that the message is "model.hf is not set", not "model is not set"
    try:
        return Settings.model_validate(values.tree)
    except ValidationError as error:
        problems = [_problem(details, values, path) for details in error.errors()]
    if len(problems) == 1:
        raise problems[0]
    raise UserError("\n".join([f"{len(problems)} problems in the settings:", *(f"- {p}" for p in problems)]))


def resolved_yaml(settings: Settings) -> str:
    """All settings as YAML text, with all defaults written out. `load_settings` reads equal settings from it."""
    return yaml_files.dump(settings.model_dump(mode="json", by_alias=True))


def _problem(details: ErrorDetails, values: Values, path: Path | str) -> UserError:
    """Rewords one of pydantic's errors."""
    location: Location = tuple(part for part in details["loc"] if part != "[key]")  # a wrong key inside a mapping
    key, kind = key_text(location), details["type"]
    origin = values.origin(location)
    where = f" ({origin})" if origin else ""
    cause = details.get("ctx", {}).get("error")
    field = describe.find(location)
    if key in RENAMED:
        return UserError(f"the setting {key} is now called {RENAMED[key]}{where}", f"write {RENAMED[key]} instead")
    if kind in ("extra_forbidden", "invalid_key"):
        return UserError(f"unknown setting {key}{where}", _nearest(location))
    if kind == "missing":
        meaning = f" ({describe.brief(field.description)})" if field and field.description else ""
        return UserError(f"{key} is not set{meaning}", f"add it to {path}, or {key}=… on the command line")
    if isinstance(cause, UserError) and (field is None or describe.section_class(field)):  # a check between fields
        return UserError(f"{cause.message}{_origins_of_named(cause.message, values)}", cause.remedy)
    given = details["input"]
    value = quoted(given) if isinstance(given, str) else shortened(describe.value_text(given))
    if isinstance(cause, UserError):
        return UserError(f"{key} is {value}{where}: {cause.message}", cause.remedy)
    allowed = f"allowed: {describe.allowed(field)}" if field else details["msg"]
    return UserError(f"{key} is {value}{where}; {allowed}", _list_of_one(key, given, field))


def _list_of_one(key: str, given: Any, field: FieldInfo | None) -> str | None:
    """The remedy for one value where a list of values belongs."""
    if field is None or not describe.allowed(field).startswith("list of ") or not isinstance(given, str | int | float):
        return None
    return f"write a list, also of one value: {key}=[{shortened(describe.value_text(given))}]"


def key_text(location: Location) -> str:
    """("data", "train", 0, "path") as data.train[0].path."""
    steps = (f"[{part}]" if isinstance(part, int) else f".{shortened(part, MOST)}" for part in location)
    return "".join(steps).removeprefix(".")


def _nearest(location: Location) -> str:
    """Suggests the intended key: a similar key in the section, a similar key elsewhere, or one described that way."""
    parent, name = location[:-1], str(location[-1])
    siblings = _keys_under(parent)
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {key_text((*parent, close[0]))}?"
    known = {entry.key.rpartition(".")[2]: entry.key for entry in reversed(list(describe.entries()))}
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f"did you mean {known[close[0]]}?"
    for entry in describe.entries():
        if name.replace("_", " ") in entry.meaning:
            return f"did you mean {entry.key} ({describe.brief(entry.meaning)})?"
    return f"known {'keys in ' + key_text(parent) if parent else 'settings'}: {', '.join(siblings)}"


def _keys_under(parent: Location) -> list[str]:
    if not parent:
        return describe.keys_of(Settings)
    field = describe.find(parent)
    model = field and (describe.section_class(field) or describe.item_class(field))
    return describe.keys_of(model) if model else []


def _origins_of_named(message: str, values: Values) -> str:
    """The places where the settings that a message names were set: " (a.yaml:3, override b=1)"."""
    origins = []
    for key in re.findall(r"[a-z_]+(?:\.[a-z0-9_]+)+", message):
        origin = values.origins.get(tuple(key.split(".")))
        if origin and origin not in origins:
            origins.append(origin)
    return f" ({', '.join(origins)})" if origins else ""
