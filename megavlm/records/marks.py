r"""The marks <image>, <video> and <box> in texts, and the files and boxes that they stand for.

A mark with a backslash before it, ``\<image>``, is the word itself, without the backslash. A part of text contains
words only, except that <box> is a mark there, too.
"""

import re
from collections.abc import Collection
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.records.boxes import MARK as BOX_MARK
from megavlm.records.boxes import Box, check_box, count_marks
from megavlm.records.values import kind_of

MARKS = {"<image>": "image", "<video>": "video"}
MEDIA_PARTS = {"image": "image", "video": "video", "image_url": "image", "video_url": "video"}
"""The types of parts that stand for a picture or video; those with _url are OpenAI's."""
_MARK = re.compile(rf"\\?({'|'.join(MARKS)})")


def escaped(text: str, kind: str) -> str:
    """The text with a backslash before each <image> or <video> (the `kind`) that would be a mark; see ``_MARK``."""
    return _MARK.sub(lambda found: "\\" + found[0] if MARKS.get(found[0]) == kind else found[0], text)


def num_marks(text: str, kind: str) -> int:
    """Number of pictures or videos (the `kind`, "image" or "video") that a text marks."""
    return sum(MARKS.get(found[0]) == kind for found in _MARK.finditer(text))


def without_marks(text: str) -> str:
    """The text as a reader sees it: without marks, and with the words for which a backslash stood before them."""
    return _MARK.sub(lambda found: "" if found[0] in MARKS else found[1], text)


def place_of_media(part: dict) -> str | None:
    """The field in which a part of one of MEDIA_PARTS names its file; None if the file is in the record's list."""
    return next((name for name in (part["type"], "path", "url") if part.get(name) is not None), None)


class Places:
    """Assigns the media of a record to the marks in its text, in order, and counts both."""

    def __init__(self, listed: dict[str, list], boxes: list | None, source: str):
        self.source, self._boxes = source, boxes
        self._nearest: list[int] = []  # for each <box> mark: the number of the picture before it, or of the first one
        self.images: list[Any] = []
        self.videos: list[Any] = []
        self._listed = listed
        self._places = {"images": 0, "videos": 0}  # how many marks have taken a file from the list
        self.has_literal_marks = False

    def parts(self, content: Any, where: str, marked: Collection[str] = ("image", "video")) -> list[dict]:
        """Convert a content string or list of parts to parts without file names.

        Args:
            content: the content.
            where: its name in error messages.
            marked: the kinds of media whose marks in a string are marks; others are words.
        """
        if isinstance(content, str):
            parts = self._pieces(content, marked)
        elif isinstance(content, list):
            parts = content
        else:
            raise UserError(f"{self.source}: {where} must be a string or a list of parts, found {kind_of(content)}")
        return [self._place(part, where) for part in parts]

    def _pieces(self, content: str, marked: Collection[str]) -> list[dict]:
        parts: list[dict] = []
        text: list[str] = []  # since the last mark
        end = 0

        def end_text() -> None:
            if joined := "".join(text):
                parts.append({"type": "text", "text": joined})
            text.clear()

        for found in _MARK.finditer(content):
            text.append(content[end : found.start()])
            end = found.end()
            kind = MARKS.get(found[0])
            if kind in marked:
                end_text()
                parts.append({"type": kind})
            else:
                text.append(found[1])
                self.has_literal_marks |= kind is not None
        text.append(content[end:])
        end_text()
        return parts

    def _place(self, part: Any, where: str) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if self._boxes is not None:
                self._nearest += [max(len(self.images) - 1, 0)] * count_marks(part["text"])
            return part
        if not isinstance(kind, str) or kind not in MEDIA_PARTS:
            raise UserError(
                f"{self.source}: {where} has a part of an unknown form: {quoted(part)}",
                'a part is {"type": "text", "text": …}, {"type": "image", "image": path} or '
                '{"type": "video", "video": path}',
            )
        field, kind = place_of_media(part), MEDIA_PARTS[kind]
        placed = None if field is None or (field == "url" and self._listed[kind + "s"]) else part[field]
        if isinstance(placed, dict) and "url" in placed:  # as OpenAI writes it
            placed = placed["url"]
        if placed is None:
            name = kind + "s"
            number = self._places[name]
            self._places[name] += 1
            placed = self._listed[name][number] if number < len(self._listed[name]) else None
        elif kind == "video" and "fps" in part:
            placed = {"frames": placed, "fps": part["fps"]}
        (self.images if kind == "image" else self.videos).append(placed)
        return {"type": kind}

    def finish(self, has_dropped: bool) -> list[Box] | None:
        """The checked boxes; None if there is no list of them.

        Raises UserError unless each listed file or box has a mark and each mark has an entry.
        """
        boxes = self._boxes or []
        counts = [
            ("images", "<image>", self._places["images"], len(self._listed["images"])),
            ("videos", "<video>", self._places["videos"], len(self._listed["videos"])),
            ("boxes", BOX_MARK, len(self._nearest), len(boxes)),
        ]
        for name, mark, count, listed in counts:
            if count != listed and not (has_dropped and count < listed):
                as_part = "" if name == "boxes" else f', or the part {{"type": "text", "text": "{mark}"}}'
                raise UserError(
                    f"{self.source}: the text contains {count} {mark}, but {name} has {listed} entries",
                    f"list one entry in {name} for each {mark}, in the same order; for the word itself, write "
                    f'\\{mark} (in JSON "\\\\{mark}"){as_part}',
                )
        return self._boxes and [
            check_box(box, nearest, len(self.images), self.source)
            for box, nearest in zip(boxes, self._nearest, strict=False)
        ]
