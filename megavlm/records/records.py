r"""Checks one line of data in any of the accepted forms and converts it to a single form, ``Record``.

Fine-tuning: ``{"messages": [{"role", "content"}, …], "images": [path, …], "videos": [video, …]}``. In a content
string, ``<image>`` and ``<video>`` mark the positions of the media; the content may also be a list of parts, as in the
chat format. Pretraining: the same, or ``{"text": "…<image>…", "images": […]}``, where the text may be a list of parts,
too. A video is a path, a list of frame paths (these count as already sampled), or ``{"frames": [path, …], "fps":
number}``.

The words <image> and <video> themselves are written ``\<image>``, or in a part of text. In the text of a record
without the field ``images`` (``videos``) they are words anyway.

``"boxes": [[x1, y1, x2, y2], …]`` replaces each ``<box>`` mark by a box (or a point, ``[x, y]``). Boxes are given in
pixels of the picture before the mark and written into the text in Qwen3-VL's coordinates, 0 to 1000 (see ``boxes``).

An assistant message may have ``"loss": false`` (it is excluded from the loss) or ``"weight": number`` (the loss weight
of its tokens).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.records.boxes import Box, fill_marks
from megavlm.records.forms import form_of, other_form
from megavlm.records.marks import MARKS, MEDIA_PARTS, Places, place_of_media
from megavlm.records.prompts import ASKING, as_conversation, with_answer
from megavlm.records.skipped_samples import NO_TARGET, UnfitSample
from megavlm.records.values import check_values, is_number, kind_of

Kind = Literal["tune", "pretrain", "prompt", "pair", "judged"]

FIELDS = ("messages", "text", "images", "videos", "boxes", "tools")
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "loss", "weight")
ROLES = ("system", "user", "assistant", "tool")
_SLOWEST, _FASTEST = 1e-9, 1e9  # frames per second; beyond these, times cannot be computed


@dataclass
class Record:
    """One checked sample. Either ``text`` (a list of parts) or ``messages`` is set.

    Attributes:
        text: the parts of a document: ``{"type": "text", "text": …}``, ``{"type": "image"}`` or ``{"type": "video"}``.
        messages: the conversation as the chat template expects it; media are parts without file names.
        weights: the loss weight of each message's tokens, 0 if the message is excluded from the loss.
        images: the path of each picture as written in the line, in order of appearance in the text.
        videos: each video as written in the line, in order of appearance in the text.
        boxes: the boxes, in order of appearance in the text; None if <box> has no meaning in the record.
        tools: tool descriptions that are passed to the chat template.
        has_literal_marks: whether marks in the text were read as words because the record lists no files for them.
    """

    text: list[dict] | None = None
    messages: list[dict] | None = None
    weights: list[float] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    boxes: list[Box] | None = None
    tools: list[dict] | None = None
    has_literal_marks: bool = False

    def fill_boxes(self, sizes: list[tuple[int, int]], source: str) -> None:
        """Write the boxes into the text in place of their marks.

        Args:
            sizes: (height, width) of each picture in pixels.
            source: "file:line", for error messages.
        """
        if self.boxes is None:
            return
        written = iter([box.written(*sizes[box.image], source) for box in self.boxes])

        def fill_parts(parts: list[dict]) -> list[dict]:
            return [
                part | {"text": fill_marks(part["text"], written)} if part["type"] == "text" else part for part in parts
            ]

        if self.text is not None:
            self.text = fill_parts(self.text)
        for message in self.messages or []:
            if content := message.get("content"):
                is_text = isinstance(content, str)
                message["content"] = fill_marks(content, written) if is_text else fill_parts(content)


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
        raise UserError(f"{source}: a line must be a JSON object, found {kind_of(raw)}")
    check_values(raw, (*FIELDS, *ASKING) if kind == "prompt" else FIELDS, source)
    if kind == "prompt":
        raw = as_conversation(raw, source)
    elif kind == "tune":
        raw = with_answer(raw, source)
    is_missing = "messages" not in raw and "text" not in raw
    if is_missing and form_of(raw) is not None:
        raise other_form(raw, "messages", (), source)
    for name in raw:
        _refuse_near_miss(name, FIELDS, source)
    if is_missing:
        raise other_form(raw, "messages", (), source)
    if "messages" in raw and "text" in raw:
        raise UserError(f"{source}: a sample must have either messages or text; this one has both")
    listed = {name: _list_of_media(raw, name, source) for name in ("images", "videos")}
    places = Places(listed, _list_of_media(raw, "boxes", source) if "boxes" in raw else None, source)
    record = Record(images=places.images, videos=places.videos)
    if "text" in raw:
        if "tools" in raw:
            raise UserError(f"{source}: tools can only be used with messages; a text sample would ignore them")
        listed_kinds = {kind for kind in MARKS.values() if raw.get(kind + "s") is not None}
        record.text = places.parts(raw["text"], "text", listed_kinds)
        record.has_literal_marks = places.has_literal_marks
    else:
        record.tools = _list_of_objects(raw, "tools", source)
        record.messages, record.weights = _check_messages(raw["messages"], kind, places, source)
    record.boxes = places.finish(has_dropped=kind == "prompt")
    for video in record.videos:
        fps: Any = video.get("fps") if isinstance(video, dict) else None
        if is_number(fps) and not (fps <= 0 or _SLOWEST <= fps <= _FASTEST):
            raise UserError(f"{source}: fps must be from {_SLOWEST:g} to {_FASTEST:g}, found {fps!r}")
    return record


def rename_media(record: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a record in which every path of a picture, video or frame is renamed, in order of appearance.

    Parts of the record that have none of the accepted forms are left unchanged; `check_record` reports them later.
    """

    def media(named: Any) -> Any:
        if isinstance(named, str):
            return rename(named)
        if isinstance(named, dict) and isinstance(named.get("url"), str):
            return named | {"url": rename(named["url"])}
        if isinstance(named, list):
            return [media(item) for item in named]
        return named | {"frames": media(named["frames"])} if isinstance(named, dict) and "frames" in named else named

    def part(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        field = place_of_media(part) if isinstance(kind, str) and kind in MEDIA_PARTS else None
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
        elif name == "text" and isinstance(value, list):
            value = [part(item) for item in value]
        renamed[name] = value
    return renamed


def _check_messages(messages: Any, kind: Kind, places: Places, source: str) -> tuple[list[dict], list[float]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{source}: messages must be a list with at least one message, found {kind_of(messages)}")
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
            found = f"role {quoted(role)}" if role is not None else f"no role in {quoted(message)}"
            raise UserError(f"{source}: {where} has {found}; allowed roles: {', '.join(ROLES)}")
        for name in message:
            _refuse_near_miss(name, MESSAGE_FIELDS, f"{source}: {where}")
        weights.append(_weight(message, kind, f"{source}: {where}"))
        message = {name: value for name, value in message.items() if name not in ("loss", "weight")}
        content = message.get("content")
        if not isinstance(message.get("reasoning_content") or "", str):
            raise UserError(f"{source}: {where}.reasoning_content must be a string")
        _list_of_objects(message, "tool_calls", f"{source}: {where}")
        if content is None and not message.get("tool_calls"):
            raise UserError(f"{source}: {where} has no content")
        if content is not None:
            parts = places.parts(content, f"{where}.content")
            # Content without media stays a string, because every chat template supports that form.
            is_text = isinstance(content, str) and all(part["type"] == "text" for part in parts)
            message["content"] = "".join(part["text"] for part in parts) if is_text else parts
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
        raise UserError(f"{where}: loss must be true or false, found {quoted(message['loss'])}")
    weight = message.get("weight", 1.0)
    if not is_number(weight) or weight < 0:
        raise UserError(f"{where}: weight must be a number of at least 0 and at most 3.4e38, found {quoted(weight)}")
    return float(weight) if message["role"] == "assistant" and message.get("loss", True) else 0.0


def _list_of_media(raw: dict, name: str, source: str) -> list:
    listed = raw.get(name)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{source}: {name} must be a list, found {kind_of(listed)}", f'write "{name}": [path, …]')
    return listed


def _list_of_objects(raw: dict, name: str, where: str) -> list[dict] | None:
    listed = raw.get(name)
    if listed is not None and not (isinstance(listed, list) and all(isinstance(item, dict) for item in listed)):
        raise UserError(f"{where}: {name} must be a list of objects, found {quoted(listed)}")
    return listed


def _refuse_near_miss(name: str, known: tuple[str, ...], where: str) -> None:
    """Unknown fields are allowed, because a data set may have its own, unless one looks like a misspelt known field."""
    # Names that are far longer are not misspelt, and comparing them takes long.
    is_known = name in known or len(name) > 30
    near = [] if is_known else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    if near:
        raise UserError(f"{where}: unknown field {name!r}", f"did you mean {near[0]!r}?")
