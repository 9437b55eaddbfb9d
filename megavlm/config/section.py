"""What the sections of a configuration file are made of: strict scalars, paths, the class of a group of settings."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from megavlm.base.errors import UserError

# Strict scalars: "8" is not a number and 1 is not a truth value, so that a slip in a file is seen. (A whole number is
# still a good float.)
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]


def _path(value: Any) -> Any:
    """Refuses "", which would silently mean the current directory, and knows "~"."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError("an empty path")
        return Path(value).expanduser()
    return value


def _path_or_url(value: Any) -> Any:
    return value if isinstance(value, str) and "://" in value else _path(value)


FilePath = Annotated[Path, BeforeValidator(_path)]
DataPath = Annotated[Path | Str, BeforeValidator(_path_or_url)]  # a URL stays a string: a Path would lose a slash
Part = Literal["vision", "projector", "language"]


class Section(BaseModel):
    """A group of settings. Unknown names are refused, values are final, an empty section means its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @classmethod
    def default_of(cls, name: str) -> Any:
        """The default of field `name`, for checks of "this would be ignored"."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    def is_changed(self, name: str) -> bool:
        """Whether field `name` differs from its default (a default written out, as in config.yaml, is no change)."""
        return getattr(self, name) != self.default_of(name)
