"""Pictures and videos inside a record: bytes in a table, data URIs and base64 in JSON.

They are replaced by names, so that a record stays small, and read again when their size or pixels are wanted, so that
the drafts that wait to be packed hold no pictures.
"""

import base64
import io
import re
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from megavlm.media.files import File, Find

MARK = "#"  # the first character of such a name, "#images.0.png"
_MOST = 1 << 26  # characters of base64: 48 MiB of a picture
_LEAST = 64  # shorter texts are no pictures
_DATA_URI = ("data:image/", "data:video/")
_BASE64 = {"/9j/": "jpg", "iVBORw0KGgo": "png", "R0lGOD": "gif", "UklGR": "webp"}  # how base64 of pictures begins
_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tif"}
_IN_LINE = (b";base64,", *(f'"{start}'.encode() for start in _BASE64), b'"\\/9j\\/')
# Fields of words: what they say stays what it is, also where it is base64.
_WORDS = frozenset(
    [
        "content",
        "text",
        "value",
        "question",
        "answer",
        "prompt",
        "problem",
        "chosen",
        "rejected",
        "completion",
        "instruction",
        "input",
        "output",
        "query",
        "response",
        "user",
        "assistant",
        "solution",
    ]
)
_MEDIA = re.compile("image|img|picture|photo|screenshot|video|frame|media", re.IGNORECASE)  # in names of fields
_OF_TOOLS = frozenset(["tools", "tool_calls", "arguments"])


class Raw(Protocol):
    """A file whose samples may contain pictures."""

    path: str

    def source(self, index: int) -> str: ...

    def raw(self, index: int) -> Any:
        """The record of sample `index` with what is inside it."""


@dataclass(frozen=True)
class InlineFile(File):
    """A picture or video inside sample ``index`` of ``samples``, at the keys ``place``."""

    samples: Any = field(default=None, repr=False)
    index: int = 0
    place: tuple = ()

    @property
    def local_path(self) -> str | None:
        return None

    def size(self) -> int:
        value = self._value()
        if isinstance(value, bytes):
            return len(value)
        text = _base64(value)
        return len(text) * 3 // 4 - text[-2:].count("=")

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        value = self._value()
        return (value if isinstance(value, bytes) else base64.b64decode(_base64(value), validate=True))[start:end]

    def _value(self) -> Any:
        value = _last.record_of(self.samples, self.index)
        for key in self.place:
            value = value[key]
        return value

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read())


class _LastRecord:
    """The record that was read last, because all pictures of a sample are read one after the other."""

    def __init__(self) -> None:
        self._held: tuple[Any, int, Any] = (None, 0, None)  # replaced at once, so that threads may share it

    def record_of(self, samples: "Raw", index: int) -> Any:
        of, number, record = self._held
        if of is not samples or number != index:
            record = samples.raw(index)
            self._held = (samples, index, record)
        return record


_last = _LastRecord()


def may_be_inside(line: bytes) -> bool:
    """Whether a line of JSON may contain a picture."""
    return len(line) > _LEAST and any(start in line for start in _IN_LINE)


def with_names(samples: Raw, index: int, record: Any, find: Find) -> tuple[Any, Find]:
    """The record with names in place of the pictures and videos inside it, and the function that locates all media."""
    places: dict[str, tuple] = {}
    record = _walk(record, (), places)
    if not places:
        return record, find
    return record, _Found(samples, index, places, find)


@dataclass(frozen=True)
class _Found:
    samples: Raw
    index: int
    places: dict[str, tuple]
    others: Find

    def __call__(self, named: str) -> File:
        if named not in self.places:
            return self.others(named)
        shown = f"{self.samples.source(self.index)} {named.removeprefix(MARK)}"
        return InlineFile(
            f"{self.samples.path}{named}", name=shown, samples=self.samples, index=self.index, place=self.places[named]
        )


def _walk(value: Any, place: tuple, places: dict[str, tuple]) -> Any:
    if isinstance(value, dict):
        if _is_picture(value, place):
            return _walk(value["bytes"], (*place, "bytes"), places) if value.get("bytes") else value["path"]
        return {key: _walk(item, (*place, key), places) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, (*place, number), places) for number, item in enumerate(value)]
    if isinstance(value, bytes):
        kind = next(
            (kind for start, kind in _KINDS.items() if value.startswith(start)), "mp4" if _is_mp4(value) else "bin"
        )
    elif isinstance(value, str) and len(value) > _LEAST and place and place[-1] not in _WORDS:
        if (found := _kind_of(value)) is None:
            return value
        kind = found
    else:
        return value
    name = f"{MARK}{'.'.join(str(key) for key in place if key not in ('bytes', 'url'))}.{kind}"
    places[name] = place
    return name


def _is_picture(value: dict, place: tuple) -> bool:
    """Whether this is an image as Hugging Face's data sets have it, and not, say, what a tool was called with."""
    if not value.keys() <= {"bytes", "path"}:
        return False
    if isinstance(value.get("bytes"), bytes):
        return True
    below = [key for key in place if isinstance(key, str)]
    is_named = any(_MEDIA.search(key) for key in below) and not _OF_TOOLS & set(below)
    return is_named and isinstance(value.get("bytes", value.get("path")), str)


def _kind_of(text: str) -> str | None:
    """The kind of picture or video of a data URI or of base64; None if a text is neither."""
    if text.startswith(_DATA_URI):
        kind = re.split("[;,+]", text[len(_DATA_URI[0]) : 40])[0].lower()
        return {"jpeg": "jpg"}.get(kind, kind) if kind.isalnum() else "bin"
    return next((kind for start, kind in _BASE64.items() if text.startswith(start) and " " not in text[:1000]), None)


def _is_mp4(value: bytes) -> bool:
    return value[4:8] == b"ftyp"


def _base64(value: str) -> str:
    """The base64 of a picture. Raises ValueError if it is none, or too long."""
    if len(value) > _MOST:
        raise ValueError(f"it has {len(value):,} characters of base64; at most {_MOST:,} are read")
    text = value
    if value.startswith("data:"):
        head, _, text = value.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data URI must be in base64: data:image/png;base64,…")
    return "".join(text.split())
