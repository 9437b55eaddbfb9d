"""What an environment says: the forms that its methods may return, and the one form that the trainer gets."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted, shortened


@dataclass
class Step:
    """What ``reset`` and ``step`` of an environment return; a mapping or tuple with these fields will do, too.

    Attributes:
        text: the message. ``<image>`` marks where a picture stands; without marks, pictures come first.
        pictures: pictures: of Pillow, paths (relative to the folder of the data), arrays of numpy (uint8 [height,
            width] or [height, width, 3 or 4]), or the bytes of files.
        reward: the reward of this answer; None: none. Those of a conversation are added up.
        done: whether the conversation ends here. Then the message is shown to readers only.
    """

    text: str = ""
    pictures: Sequence[Any] = ()
    reward: float | None = None
    done: bool = False


@dataclass(frozen=True)
class Observation:
    """A ``Step`` that was checked: pictures are the bytes of files."""

    text: str = ""
    pictures: tuple[bytes, ...] = ()
    reward: float | None = None
    done: bool = False


_FIELDS = tuple(Step.__dataclass_fields__)


def checked(returned: Any, folder: str, *, is_first: bool = False) -> Observation:
    """Checks what a method has returned.

    Args:
        returned: the result.
        folder: the folder from which relative paths start.
        is_first: whether ``reset`` has returned it, which may be None or a text, and has no reward and no end.

    Raises:
        UserError: it has none of the forms. The message does not name the method.
    """
    if is_first and returned is None:
        return Observation()
    fields = _fields(returned)
    text, reward, done = fields["text"], _number(fields["reward"]), fields["done"]
    if not isinstance(text, str):
        raise UserError(f"its text is {quoted(text)}, which is no text")
    if not isinstance(done, bool) and type(done).__name__ not in ("bool_", "bool"):  # numpy's
        raise UserError(f"done is {quoted(done)}, which is neither true nor false")
    if is_first and (reward is not None or done):
        raise UserError("it has a reward, or ends the conversation, before the first answer")
    pictures = fields["pictures"]
    if isinstance(pictures, str | bytes | Mapping) or not isinstance(pictures, Sequence):
        raise UserError(f"its pictures are {quoted(pictures)}, which is no list")
    files = tuple(_file(picture, number, folder) for number, picture in enumerate(pictures, 1))
    return Observation(text.encode("utf-8", "replace").decode(), files, reward, bool(done))


def _fields(returned: Any) -> dict[str, Any]:
    defaults = {name: getattr(Step, name) for name in _FIELDS}
    if isinstance(returned, str):
        given = {"text": returned}
    elif isinstance(returned, Mapping):
        if unknown := [name for name in returned if name not in _FIELDS]:
            raise UserError(f"it has {quoted(unknown[0])}, but the fields are {', '.join(_FIELDS)}")
        given = dict(returned)
    elif isinstance(returned, tuple) and len(returned) <= len(_FIELDS):
        given = dict(zip(_FIELDS, returned, strict=False))
    elif hasattr(returned, "text") and hasattr(returned, "done"):
        given = {name: getattr(returned, name) for name in _FIELDS if hasattr(returned, name)}
    else:
        raise UserError(f"it returned {quoted(returned)}, which is no Step, mapping or tuple of {', '.join(_FIELDS)}")
    found = defaults | given
    return found | {name: defaults[name] for name in ("text", "pictures") if found[name] is None}


def _number(reward: Any) -> float | None:
    """A number, of numpy and torch, too. A truth value counts as 1 or 0, but text is none."""
    if reward is None:
        return None
    try:
        number = float(reward) if hasattr(reward, "__float__") else math.nan
    except Exception:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"its reward is {quoted(reward)}, which is no finite number")
    return number


def _file(picture: Any, number: int, folder: str) -> bytes:
    """The bytes of a picture file. What is no file yet becomes a PNG, which keeps every pixel."""
    try:
        if isinstance(picture, bytes | bytearray):
            return bytes(picture)
        if isinstance(picture, str | Path):
            return (Path(folder) / picture).read_bytes()
        from PIL import Image  # only environments with pictures need it

        if not isinstance(picture, Image.Image):
            picture = _from_array(picture)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"its picture {number} cannot be used: {type(error).__name__}: {shortened(error)}") from None


def _from_array(values: Any) -> Any:
    from PIL import Image

    if not hasattr(values, "__array_interface__"):
        raise UserError(f"{quoted(values)} is no picture")
    kind = getattr(values, "dtype", None)
    if str(kind) != "uint8":
        raise UserError(f"an array of {kind} is no picture: its numbers must be uint8")
    return Image.fromarray(values)
