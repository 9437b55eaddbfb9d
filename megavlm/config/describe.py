"""Descriptions of settings for help texts and messages: the default, allowed values and meaning of each key."""

import re
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
    """One setting. `key` has dots as in an override; `section` is "" for settings at the top level."""

    key: str
    section: str
    default: str
    allowed: str
    meaning: str


def entries(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[SettingEntry]:
    """All settings in the order of their declaration. Settings in nested sections belong to the top-level section."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = section_class(field)
        if section:
            yield from entries(section, key + ".")
        else:
            default = "required" if field.is_required() else value_text(field.get_default(call_default_factory=True))
            yield SettingEntry(
                key, key.partition(".")[0] if "." in key else "", default, allowed(field), field.description or ""
            )


def about(section: str) -> str:
    """The first line of a top-level section's docstring; "" for the settings outside sections."""
    field = Settings.model_fields.get(section)
    described = section_class(field) if field else None
    return (described.__doc__ or "").partition("\n")[0] if described else ""


def brief(meaning: str) -> str:
    """The first clause of a setting's meaning, for messages: without its values one by one."""
    return re.split(r"[.;] ", meaning, maxsplit=1)[0]


def find(loc: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at a location such as ("data", "train", 0, "path"), or None. Keys inside a mapping belong to it."""
    model: type[BaseModel] | None = Settings
    field: FieldInfo | None = None
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()} if model is not None else {}
        field = fields.get(part)
        if field is None or get_origin(field.annotation) is dict:
            return field
        model = section_class(field) or item_class(field)
    return field


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section; None for other fields."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def keys_of(model: type[BaseModel]) -> list[str]:
    """The names of a section's fields as they are written in a file."""
    return [field.alias or name for name, field in model.model_fields.items()]


def value_text(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed(field: FieldInfo) -> str:
    """The values that a field accepts, for example "whole number ≥ 1, or null"."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner: list[Any] = []
        for constraint in arguments[1:]:  # Field(ge=1) inside Annotated keeps its own list of constraints
            inner += constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
        return _allowed(arguments[0], [*inner, *metadata])
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
    return {bool: "true | false", str: "text", Path: "path", Any: "anything"}[annotation]


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
    """The class of the sections that a list holds; None for other fields."""
    item = next(iter(get_args(field.annotation)), None)
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None
