"""Building blocks for the sections of a configuration file: strict scalars, paths, and the class of a section."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from megavlm.base.errors import UserError

_LARGEST = 2**31 - 1  # whole number that fits into the int32 of Megatron and torch
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1e-37, 1e38  # numbers that float32 still distinguishes from 0 and infinity


def _fits_int32(value: int) -> int:
    if abs(value) > _LARGEST:
        raise UserError(f"whole numbers can be at most {_LARGEST}")
    return value


def _fits_float32(value: float) -> float:
    if value != 0 and not _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT:
        raise UserError(
            f"numbers are computed in float32, which needs 0 or a size of {_SMALLEST_FLOAT:g} to {_LARGEST_FLOAT:g}"
        )
    return value


def _is_a_factor(value: float) -> float:
    if _fits_float32(value) > 1e6:
        raise UserError("it can be at most 1e6")
    return value


# Strict scalars: "8" is not accepted as a number, nor 1 as a truth value, so that mistakes in a file are noticed. (A
# whole number is still accepted as a float.)
Int = Annotated[int, Strict(), AfterValidator(_fits_int32)]
Float = Annotated[float, Strict(), AfterValidator(_fits_float32)]
Positive = Annotated[float, Strict(), Field(gt=0), AfterValidator(_is_a_factor)]
Count = Annotated[int, Strict(), Field(ge=1), AfterValidator(_fits_int32)]
# A number of steps as the key of a table; config.yaml has such keys as text.
Steps = Annotated[
    int,
    BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 11 else key),
    Strict(),
    Field(ge=0),
    AfterValidator(_fits_int32),
]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]


def _path(value: Any) -> Any:
    """Refuses "", which would silently mean the current directory, and expands "~"."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError("the path is empty")
        if "\0" in value:
            raise UserError("a path cannot contain a zero byte")
        if re.search("[\ud800-\udfff]", value):
            raise UserError("the path is not valid text in UTF-8")
        return Path(value).expanduser()
    return value


def _path_or_url(value: Any) -> Any:
    return value if isinstance(value, str) and "://" in value else _path(value)


FilePath = Annotated[Path, BeforeValidator(_path)]
DataPath = Annotated[Path | Str, BeforeValidator(_path_or_url)]  # a URL stays a string: a Path would lose a slash
Part = Literal["vision", "projector", "language"]


class Section(BaseModel):
    """A group of settings. Unknown names are errors, values cannot be changed, an empty section has its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @classmethod
    def default_of(cls, name: str) -> Any:
        """The default of field `name`, for checks that no setting is ignored."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    def is_changed(self, name: str) -> bool:
        """Whether field `name` differs from its default. A default that is written out, as in config.yaml, does not."""
        return getattr(self, name) != self.default_of(name)
