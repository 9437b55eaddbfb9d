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
        return len(self.read())

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        value = self.samples.raw(self.index)
        for key in self.place:
            value = value[key]
        return _decoded(value)[start:end]

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read())


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
        if value.keys() <= {"bytes", "path"} and isinstance(value.get("bytes", value.get("path")), bytes | str):
            # an image of Hugging Face's data sets
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


def _kind_of(text: str) -> str | None:
    """The kind of picture or video of a data URI or of base64; None if a text is neither."""
    if text.startswith(_DATA_URI):
        kind = re.split("[;,+]", text[len(_DATA_URI[0]) : 40])[0].lower()
        return {"jpeg": "jpg"}.get(kind, kind) if kind.isalnum() else "bin"
    return next((kind for start, kind in _BASE64.items() if text.startswith(start) and " " not in text[:1000]), None)


def _is_mp4(value: bytes) -> bool:
    return value[4:8] == b"ftyp"


def _decoded(value: Any) -> bytes:
    """The bytes of a picture. Raises ValueError if they are not base64, or too many."""
    if isinstance(value, bytes):
        return value
    if len(value) > _MOST:
        raise ValueError(f"it has {len(value):,} characters of base64; at most {_MOST:,} are read")
    text = value
    if value.startswith("data:"):
        head, _, text = value.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data URI must be in base64: data:image/png;base64,…")
    return base64.b64decode("".join(text.split()), validate=True)
