"""The forms in which a line of data may come, checked and brought to one form.

Tuning: ``{"messages": [{"role", "content"}, …], "images": [path, …], "videos": [video, …]}``. In a content string,
``<image>`` and ``<video>`` mark the places of the media; a content may also be the chat format's list of parts.
Pretraining: the same, or ``{"text": "…<image>…", "images": […]}``. A video is a path, a list of paths of frames
(taken as sampled already), or ``{"frames": [path, …], "fps": number}``.

``"boxes": [[x1, y1, x2, y2], …]`` fills the places marked ``<box>`` with boxes (or points, ``[x, y]``), given in
pixels of the picture before the mark and written as Qwen3-VL knows them, from 0 to 1000 (see ``boxes``).

An assistant message may say ``"loss": false`` (not learned) or ``"weight": number`` (of its tokens in the loss).
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
    """One checked sample: either ``text`` (a list of parts) or ``messages`` is set.

    Attributes:
        text: parts of a document, ``{"type": "text", "text": …}``, ``{"type": "image"}`` or ``{"type": "video"}``.
        messages: as a chat template takes them, media as parts without their files.
        weights: loss weight of each message's tokens, 0 for what is not learned.
        images: path of each picture as written, in the order of their places.
        videos: each video as written, in the order of their places.
        boxes: in the order of their places.
        tools: tool descriptions handed to the chat template.
    """

    text: list[dict] | None = None
    messages: list[dict] | None = None
    weights: list[float] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    tools: list[dict] | None = None

    def fill_boxes(self, sizes: list[tuple[int, int]], source: str) -> None:
        """Write the boxes into their places; ``sizes``: (height, width) of each picture in pixels."""
        written = iter([box.written(*sizes[box.image], source) for box in self.boxes])
        if not self.boxes:
            return

        def fill(content: str | list[dict]) -> str | list[dict]:
            if isinstance(content, str):
                return re.sub(BOX_MARK, lambda _: next(written), content)
            return [part | {"text": fill(part["text"])} if part["type"] == "text" else part for part in content]

        if self.text is not None:
            self.text = fill(self.text)
        for message in self.messages or []:
            if message.get("content"):
                message["content"] = fill(message["content"])


def check_record(raw: Any, kind: Kind, source: str) -> Record:
    """Check one parsed line and bring it to one form.

    Args:
        raw: the parsed JSON value.
        kind: "tune" learns assistant messages, "pretrain" all text, "prompt" drops the answer at the end.
        source: "file:line", for messages.

    Raises:
        UserError: anything in the line that cannot be used, or would silently be ignored.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a line must be a JSON object, found {_name(raw)}")
    for name in raw:
        _refuse_near_miss(name, FIELDS, source)
    if ("messages" in raw) == ("text" in raw):
        found = "both" if "text" in raw else f"neither (fields: {', '.join(raw) or 'none'})"
        raise UserError(f"{source}: a sample has either messages or text; this one has {found}")
    listed = {name: _list_of_media(raw, name, source) for name in ("images", "videos")}
    places = _Places(listed, _list_of_media(raw, "boxes", source) if "boxes" in raw else None, source)
    record = Record(images=places.images, videos=places.videos)
    if "text" in raw:
        if not isinstance(raw["text"], str):
            raise UserError(f"{source}: text must be a string, found {_name(raw['text'])}")
        if "tools" in raw:
            raise UserError(f"{source}: tools belong to messages; a text sample would ignore them")
        record.text = places.parts(raw["text"], "text")
    else:
        record.tools = raw.get("tools")
        record.messages, record.weights = _check_messages(raw["messages"], kind, places, source)
    record.boxes = places.finish(has_dropped=kind == "prompt")
    return record


def rename_media(record: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a record in which every path of a picture, video or frame is renamed; in its own order.

    What has none of the forms stays as it is: `check_record` will tell of it.
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
    """Takes the media named in a record to their places, in order, and counts them."""

    def __init__(self, listed: dict[str, list], boxes: list | None, source: str):
        self.source, self._boxes = source, boxes
        self._nearest: list[int] = []  # to each mark of a box: the picture before it, or else the first
        self.images: list[str] = []
        self.videos: list[Any] = []
        self._listed = listed
        self._places = {"images": 0, "videos": 0}  # that take the next file of the list

    def parts(self, content: Any, where: str) -> list[dict]:
        """A content string or list of parts as parts without files; `where` names it in messages."""
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
                f"{self.source}: {where} has a part that is not understood: {str(part)[:200]}",
                'parts are {"type": "text", "text": …}, {"type": "image", "image": path} or '
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
        """The boxes; every listed file and box must have had its place, and every place its file or box."""
        boxes = self._boxes or []
        counts = [
            ("images", "<image>", self._places["images"], len(self._listed["images"])),
            ("videos", "<video>", self._places["videos"], len(self._listed["videos"])),
            ("boxes", BOX_MARK, len(self._nearest), len(boxes)),
        ]
        for name, mark, count, listed in counts:
            if count != listed and not (has_dropped and count < listed):
                raise UserError(
                    f"{self.source}: {count} {mark} in the text, but {listed} in {name}",
                    f"give one entry of {name} for each {mark}, in the same order",
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
            raise UserError(f"{source}: nothing but assistant messages: there is nothing to answer")
    checked, weights = [], []
    for number, (message, role) in enumerate(zip(messages, roles, strict=False)):
        where = f"messages[{number}]"
        if role not in ROLES:
            found = f"role {role!r}" if role is not None else f"no role in {str(message)[:100]}"
            raise UserError(f"{source}: {where} has {found}; allowed: {', '.join(ROLES)}")
        for name in message:
            _refuse_near_miss(name, MESSAGE_FIELDS, f"{source}: {where}")
        weights.append(_weight(message, kind, f"{source}: {where}"))
        message = {name: value for name, value in message.items() if name not in ("loss", "weight")}
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise UserError(f"{source}: {where} has no content")
        if content is not None:
            parts = places.parts(content, f"{where}.content")
            # Text alone stays a string: the form for which every template is written.
            if not isinstance(content, str) or any(part["type"] != "text" for part in parts):
                message["content"] = parts
        checked.append(message)
    if kind == "tune" and not any(weights):
        raise UnfitSample(
            NO_TARGET,
            f"{source}: nothing to learn: no assistant message with a loss",
            "add the answer as an assistant message, or remove the sample",
        )
    return checked, weights


def _weight(message: dict, kind: Kind, where: str) -> float:
    given = [name for name in ("loss", "weight") if name in message]
    if given and (message["role"] != "assistant" or kind == "pretrain"):
        raise UserError(f"{where}: {given[0]} is for assistant messages in tuning; here it would be ignored")
    if not isinstance(message.get("loss", True), bool):
        raise UserError(f"{where}: loss must be true or false, found {message['loss']!r}")
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
        raise UserError(f"{where}: weight must be a number from 0 up, found {weight!r}")
    return float(weight) if message["role"] == "assistant" and message.get("loss", True) else 0.0


def _list_of_media(raw: dict, name: str, source: str) -> list:
    listed = raw.get(name)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{source}: {name} must be a list, found {_name(listed)}", f'write "{name}": [path, …]')
    return listed


def _refuse_near_miss(name: str, known: tuple[str, ...], where: str) -> None:
    """A field we do not know is the user's own business, unless it looks like a slip of one that we do."""
    near = [] if name in known else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    if near:
        raise UserError(f"{where}: unknown field {name!r}", f"did you mean {near[0]!r}?")


def _name(value: Any) -> str:
    """What a JSON value is called."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
