"""Building blocks for the sections of a configuration file: strict scalars, paths, and the class of a section."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from megavlm.base.errors import UserError

# Strict scalars: "8" is not accepted as a number, nor 1 as a truth value, so that mistakes in a file are noticed. (A
# whole number is still accepted as a float.)
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]


def _path(value: Any) -> Any:
    """Refuses "", which would silently mean the current directory, and expands "~"."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError("the path is empty")
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
