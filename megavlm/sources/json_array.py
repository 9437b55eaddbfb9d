"""The positions of the objects in a JSON array, found without keeping them in memory."""

import json
import re

import numpy as np

from megavlm.base import heartbeat
from megavlm.base.errors import UserError
from megavlm.media.files import File
from megavlm.sources.line_index import kept_index

_BLOCK = 1 << 24  # bytes that are read at a time
_LONGEST = 1 << 28  # bytes of one object
_HEAD = 1 << 16  # bytes in which the array of an object with one must begin
_KEPT_FROM = 1 << 24  # the index of a file of at least this many bytes is cached on disk: parsing is slow
_INSIDE = re.compile(
    r'\s*\{(?:\s*"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+|\{[^{}\[\]]*\})\s*,)*?\s*"data"\s*:\s*\['
)
_SPACE = re.compile(r"[ \t\r\n]*")
_SCAN = json.JSONDecoder().raw_decode


def array_spans(file: File) -> np.ndarray | None:
    """int64 [objects, 3]: the first byte of each object of a JSON array, the byte after it, and its number from 1.

    The array is the whole file, or the field "data" of an object whose other fields before it are plain values, as in
    the files of DocVQA and TextVQA. None if the file is neither, as JSONL is.

    Raises:
        UserError: the array is not valid JSON, or contains something else than objects.
        OSError: the file cannot be read.
    """
    size = file.size()
    # In Latin-1 each byte is a character, so that positions agree; what JSON consists of is ASCII.
    head = file.read(0, min(size, _HEAD)).decode("latin-1")
    bom = 3 if head.startswith("ï»¿") else 0
    start = _SPACE.match(head, bom).end()  # type: ignore[union-attr]  # it matches everything
    if head[start : start + 1] == "[":
        first = start + 1
    elif (inside := _INSIDE.match(head, bom)) and not _is_line(head):
        first = inside.end()
    else:
        return None
    if size < _KEPT_FROM:
        return _spans(file, first, size)
    return kept_index(file, "arrays", lambda parts: _spans(file, first, size))


def _is_line(head: str) -> bool:
    """Whether the first line is one of several: then the file is JSONL, whose records have a field "data"."""
    line, feed, rest = head.partition("\n")
    try:
        _SCAN(line.strip())
    except ValueError:
        return False
    return bool(feed and rest.strip())


def _spans(file: File, first: int, size: int) -> np.ndarray:
    found: list[tuple[int, int]] = []
    text, base, place = "", first, 0  # the text from byte `base` on, and the place in it
    while True:
        if place > _BLOCK // 2 or not text:
            text, base, place = text[place:], base + place, 0
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        more = base + len(text) < size
        if place < len(text) and text[place] in ",]":
            if text[place] == "]":
                break
            place += 1
            continue
        if place < len(text) and text[place] != "{":
            raise UserError(
                f"{file}: byte {base + place}, after {len(found):,} objects, begins none, but {text[place]!r}",
                "a JSON file must be an array of objects: [{…}, {…}]",
            )
        try:
            _, end = _SCAN(text, place)
        except (ValueError, RecursionError) as error:
            if not more or len(text) - place > _LONGEST or isinstance(error, RecursionError):
                raise UserError(
                    f"{file}: object {len(found) + 1:,} of the array, at byte {base + place}, is not valid JSON, or it "
                    f"has more than {_LONGEST:,} bytes",
                    "repair the file",
                ) from None
            text, base, place = text[place:], base + place, 0
            step = max(_BLOCK, len(text))  # so that a long object is scanned few times
            text += file.read(base + len(text), min(size, base + len(text) + step)).decode("latin-1")
            heartbeat.beat(f"indexing {file} from byte {base}")
            continue
        found.append((base + place, base + end))
        place = end
    spans = np.array(found, dtype=np.int64).reshape(-1, 2)
    return np.concatenate([spans, np.arange(1, len(spans) + 1)[:, None]], axis=1)
