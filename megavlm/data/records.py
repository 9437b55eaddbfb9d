"""Checks one line of data in any of the accepted forms and converts it to a single form, ``Record``.

Fine-tuning: ``{"messages": [{"role", "content"}, …], "images": [path, …], "videos": [video, …]}``. In a content
string, ``<image>`` and ``<video>`` mark the positions of the media; the content may also be a list of parts, as in the
chat format. Pretraining: the same, or ``{"text": "…<image>…", "images": […]}``. A video is a path, a list of frame
paths (these count as already sampled), or ``{"frames": [path, …], "fps": number}``.

``"boxes": [[x1, y1, x2, y2], …]`` replaces each ``<box>`` mark by a box (or a point, ``[x, y]``). Boxes are given in
pixels of the picture before the mark and written into the text in Qwen3-VL's coordinates, 0 to 1000 (see ``boxes``).

An assistant message may have ``"loss": false`` (it is excluded from the loss) or ``"weight": number`` (the loss weight
of its tokens).
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from megavlm.base.errors import UserError
from megavlm.data.boxes import MARK as BOX_MARK
from megavlm.data.boxes import Box, check_box
from megavlm.data.skipped_samples import NO_TARGET, UnfitSample

Kind = Literal["tune", "pretrain", "prompt", "pair", "judged"]

FIELDS = ("messages", "text", "images", "videos", "boxes", "tools")
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "loss", "weight")
ROLES = ("system", "user", "assistant", "tool")
MARKS = {"<image>": "image", "<video>": "video"}
_MARK = re.compile("(" + "|".join(MARKS) + ")")


@dataclass
class Record:
    """One checked sample. Either ``text`` (a list of parts) or ``messages`` is set.

    Attributes:
        text: the parts of a document: ``{"type": "text", "text": …}``, ``{"type": "image"}`` or ``{"type": "video"}``.
        messages: the conversation as the chat template expects it; media are parts without file names.
        weights: the loss weight of each message's tokens, 0 if the message is excluded from the loss.
        images: the path of each picture as written in the line, in order of appearance in the text.
        videos: each video as written in the line, in order of appearance in the text.
        boxes: the boxes, in order of appearance in the text.
        tools: tool descriptions that are passed to the chat template.
    """

    text: list[dict] | None = None
    messages: list[dict] | None = None
    weights: list[float] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    tools: list[dict] | None = None

    def fill_boxes(self, sizes: list[tuple[int, int]], source: str) -> None:
        """Write the boxes into the text in place of their marks.

        Args:
            sizes: (height, width) of each picture in pixels.
            source: "file:line", for error messages.
        """
        written = iter([box.written(*sizes[box.image], source) for box in self.boxes])
        if not self.boxes:
            return

        def fill(content: str) -> str:
            return re.sub(BOX_MARK, lambda _: next(written), content)

        def fill_parts(parts: list[dict]) -> list[dict]:
            return [part | {"text": fill(part["text"])} if part["type"] == "text" else part for part in parts]

        if self.text is not None:
            self.text = fill_parts(self.text)
        for message in self.messages or []:
            if content := message.get("content"):
                message["content"] = fill(content) if isinstance(content, str) else fill_parts(content)


def check_record(raw: Any, kind: Kind, source: str) -> Record:
    """Check one parsed line and convert it to a ``Record``.

    Args:
        raw: the parsed JSON value.
        kind: "tune" trains on assistant messages, "pretrain" on all text, "prompt" drops the answer at the end.
        source: "file:line", for error messages.

    Raises:
        UserError: the line contains something that cannot be used or that would be silently ignored.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a line must be a JSON object, found {_name(raw)}")
    for name in raw:
        _refuse_near_miss(name, FIELDS, source)
    if ("messages" in raw) == ("text" in raw):
        found = "both" if "text" in raw else f"neither (fields: {', '.join(raw) or 'none'})"
        raise UserError(f"{source}: a sample must have either messages or text; this one has {found}")
    listed = {name: _list_of_media(raw, name, source) for name in ("images", "videos")}
    places = _Places(listed, _list_of_media(raw, "boxes", source) if "boxes" in raw else None, source)
    record = Record(images=places.images, videos=places.videos)
    if "text" in raw:
        if not isinstance(raw["text"], str):
            raise UserError(f"{source}: text must be a string, found {_name(raw['text'])}")
        if "tools" in raw:
            raise UserError(f"{source}: tools can only be used with messages; a text sample would ignore them")
        record.text = places.parts(raw["text"], "text")
    else:
        record.tools = raw.get("tools")
        record.messages, record.weights = _check_messages(raw["messages"], kind, places, source)
    record.boxes = places.finish(has_dropped=kind == "prompt")
    return record


def rename_media(record: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a record in which every path of a picture, video or frame is renamed, in order of appearance.

    Parts of the record that have none of the accepted forms are left unchanged; `check_record` reports them later.
    """

    def media(named: Any) -> Any:
        if isinstance(named, str):
            return rename(named)
        if isinstance(named, list):
            return [media(item) for item in named]
        return named | {"frames": media(named["frames"])} if isinstance(named, dict) and "frames" in named else named

    def part(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        field = next((name for name in (kind, "path") if name in part), None) if kind in ("image", "video") else None
        return part if field is None else part | {field: media(part[field])}

    def message(message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        return message | {"content": [part(item) for item in content]} if isinstance(content, list) else message

    if not isinstance(record, dict):
        return record
    renamed = {}
    for name, value in record.items():
        if name in ("images", "videos") and isinstance(value, list):
            value = media(value)
        elif name in ("messages", "prompt", "chosen", "rejected", "completion"):
            value = [message(item) for item in value] if isinstance(value, list) else message(value)
        renamed[name] = value
    return renamed


class _Places:
    """Assigns the media of a record to the marks in its text, in order, and counts both."""

    def __init__(self, listed: dict[str, list], boxes: list | None, source: str):
        self.source, self._boxes = source, boxes
        self._nearest: list[int] = []  # for each <box> mark: the number of the picture before it, or of the first one
        self.images: list[Any] = []
        self.videos: list[Any] = []
        self._listed = listed
        self._places = {"images": 0, "videos": 0}  # how many marks have taken a file from the list

    def parts(self, content: Any, where: str) -> list[dict]:
        """Convert a content string or list of parts to parts without file names; `where` names it in error messages."""
        if isinstance(content, str):
            parts = [{"type": MARKS[piece]} if piece in MARKS else piece for piece in _MARK.split(content)]
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts if part]
        elif isinstance(content, list):
            parts = content
        else:
            raise UserError(f"{self.source}: {where} must be a string or a list of parts, found {_name(content)}")
        return [self._place(part, where) for part in parts]

    def _place(self, part: Any, where: str) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if self._boxes is not None:
                self._nearest += [max(len(self.images) - 1, 0)] * part["text"].count(BOX_MARK)
            return part
        if kind not in ("image", "video"):
            raise UserError(
                f"{self.source}: {where} has a part of an unknown form: {str(part)[:200]}",
                'a part is {"type": "text", "text": …}, {"type": "image", "image": path} or '
                '{"type": "video", "video": path}',
            )
        placed = next((part[name] for name in (kind, "path") if name in part), None)
        if placed is None:
            name = kind + "s"
            number = self._places[name]
            self._places[name] += 1
            placed = self._listed[name][number] if number < len(self._listed[name]) else None
        elif kind == "video" and "fps" in part:
            placed = {"frames": placed, "fps": part["fps"]}
        (self.images if kind == "image" else self.videos).append(placed)
        return {"type": kind}

    def finish(self, has_dropped: bool) -> list[Box]:
        """The checked boxes. Raises UserError unless each listed file or box has a mark and each mark has an entry."""
        boxes = self._boxes or []
        counts = [
            ("images", "<image>", self._places["images"], len(self._listed["images"])),
            ("videos", "<video>", self._places["videos"], len(self._listed["videos"])),
            ("boxes", BOX_MARK, len(self._nearest), len(boxes)),
        ]
        for name, mark, count, listed in counts:
            if count != listed and not (has_dropped and count < listed):
                raise UserError(
                    f"{self.source}: the text contains {count} {mark}, but {name} has {listed} entries",
                    f"list one entry in {name} for each {mark}, in the same order",
                )
        return [
            check_box(box, nearest, len(self.images), self.source)
            for box, nearest in zip(boxes, self._nearest, strict=False)
        ]


def _check_messages(messages: Any, kind: Kind, places: _Places, source: str) -> tuple[list[dict], list[float]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{source}: messages must be a list with at least one message, found {_name(messages)}")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if kind == "prompt":
        while roles and roles[-1] == "assistant":
            roles.pop()
        if not roles:
            raise UserError(f"{source}: messages has only assistant messages, so there is no prompt to answer")
    checked, weights = [], []
    for number, (message, role) in enumerate(zip(messages, roles, strict=False)):
        where = f"messages[{number}]"
        if role not in ROLES:
            found = f"role {role!r}" if role is not None else f"no role in {str(message)[:100]}"
            raise UserError(f"{source}: {where} has {found}; allowed roles: {', '.join(ROLES)}")
        for name in message:
            _refuse_near_miss(name, MESSAGE_FIELDS, f"{source}: {where}")
        weights.append(_weight(message, kind, f"{source}: {where}"))
        message = {name: value for name, value in message.items() if name not in ("loss", "weight")}
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise UserError(f"{source}: {where} has no content")
        if content is not None:
            parts = places.parts(content, f"{where}.content")
            # Content without media stays a string, because every chat template supports that form.
            if not isinstance(content, str) or any(part["type"] != "text" for part in parts):
                message["content"] = parts
        checked.append(message)
    if kind == "tune" and not any(weights):
        raise UnfitSample(
            NO_TARGET,
            f"{source}: the sample has no assistant message that contributes to the loss",
            "add the answer as an assistant message, or remove the sample",
        )
    return checked, weights


def _weight(message: dict, kind: Kind, where: str) -> float:
    given = [name for name in ("loss", "weight") if name in message]
    if given and (message["role"] != "assistant" or kind == "pretrain"):
        raise UserError(f"{where}: {given[0]} applies only to assistant messages in fine-tuning; here it is ignored")
    if not isinstance(message.get("loss", True), bool):
        raise UserError(f"{where}: loss must be true or false, found {message['loss']!r}")
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
        raise UserError(f"{where}: weight must be a number of at least 0, found {weight!r}")
    return float(weight) if message["role"] == "assistant" and message.get("loss", True) else 0.0


def _list_of_media(raw: dict, name: str, source: str) -> list:
    listed = raw.get(name)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{source}: {name} must be a list, found {_name(listed)}", f'write "{name}": [path, …]')
    return listed


def _refuse_near_miss(name: str, known: tuple[str, ...], where: str) -> None:
    """Unknown fields are allowed, because a data set may have its own, unless one looks like a misspelt known field."""
    near = [] if name in known else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    if near:
        raise UserError(f"{where}: unknown field {name!r}", f"did you mean {near[0]!r}?")


def _name(value: Any) -> str:
    """The kind of a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
