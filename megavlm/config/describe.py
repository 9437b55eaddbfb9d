"""Settings in words: one entry per key with default, allowed values and meaning, for help texts and messages."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megavlm.config.settings import Settings


@dataclass(frozen=True)
class SettingEntry:
    """One setting. `key` is dotted as in an override; `section` is "" for settings at the top level."""

    key: str
    section: str
    default: str
    allowed: str
    meaning: str


def entries(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[SettingEntry]:
    """All settings in the order in which they are declared; nested sections belong to their top-level section."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = section_class(field)
        if section:
            yield from entries(section, key + ".")
        else:
            default = "required" if field.is_required() else value_text(field.get_default(call_default_factory=True))
            yield SettingEntry(
                key, key.partition(".")[0] if "." in key else "", default, allowed(field), field.description
            )


def about(section: str) -> str:
    """The first line of a top-level section's docstring; "" for the settings outside sections."""
    field = Settings.model_fields.get(section)
    return section_class(field).__doc__.partition("\n")[0] if field else ""


def find(loc: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at a location such as ("data", "train", 0, "path"); None where there is none."""
    model, field = Settings, None
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()} if model else {}
        field = fields.get(part)
        if field is None:
            return None
        model = section_class(field) or item_class(field)
    return field


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is itself a group of settings."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def keys_of(model: type[BaseModel]) -> list[str]:
    """Names of a section's fields as they are written in a file."""
    return [field.alias or name for name, field in model.model_fields.items()]


def value_text(value: Any) -> str:
    """A value as it would be written in YAML on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed(field: FieldInfo) -> str:
    """What a field accepts, for example "whole number ≥ 1, or null"."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        if Path in arguments and NoneType not in arguments:
            return "path or URL"
        kinds = [a for a in arguments if a is not NoneType]
        text = " or ".join(_allowed(kind, metadata) for kind in kinds)
        return text + ", or null" if NoneType in arguments else text
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is list:
        item = arguments[0]
        if isinstance(item, type) and issubclass(item, BaseModel):
            return f"list of {{{', '.join(keys_of(item))}}}"
        return f"list of {_allowed(item, [])}"
    if origin is dict:
        return f"{{{_allowed(arguments[0], [])}: {_allowed(arguments[1], [])}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"section with {', '.join(keys_of(annotation))}"
    if annotation in (int, float):
        return " ".join(filter(None, ["whole number" if annotation is int else "number", _bounds(metadata)]))
    return {bool: "true | false", str: "text", Path: "path"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    bounds = {}
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        for constraint in metadata:
            if hasattr(constraint, name):
                bounds[sign] = value_text(getattr(constraint, name))
    if bounds.keys() == {"≥", "≤"}:
        return f"{bounds['≥']} … {bounds['≤']}"
    return " and ".join(f"{sign} {value}" for sign, value in bounds.items())


def item_class(field: FieldInfo) -> type[BaseModel] | None:
    item = next(iter(get_args(field.annotation)), None)
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None
