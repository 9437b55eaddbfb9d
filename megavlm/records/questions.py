"""What a reader wants to know of a record: the question, its pictures and videos, and the reference answer."""

from typing import Any

from megavlm.records.marks import escaped, num_marks, without_marks
from megavlm.records.records import Record


def reference_of(record: Any) -> str | None:
    """The reference answer: the assistant messages at the end, otherwise a field `answer`; None if there is neither."""
    if not isinstance(record, dict):
        return None
    texts: list[str] = []
    for message in reversed(record.get("messages") or []):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            break
        texts.insert(0, plain_text(message.get("content")))
    if texts:
        return "\n".join(texts).strip()
    answer = record.get("answer")
    return str(answer) if isinstance(answer, str | int | float) else None


def question_of(record: Record) -> str:
    """The last message that is not the assistant's, or the text of a record without messages; without marks."""
    asked = (m.get("content") for m in reversed(record.messages or []) if m["role"] != "assistant")
    content = record.text or next(asked, None) or ""
    parts = [{"text": content}] if isinstance(content, str) else content  # marks have become parts without text
    return "".join(str(part.get("text", "")) for part in parts).strip()


def plain_text(content: Any) -> str:
    """The text of a message's content as written in a record, without the marks of pictures and videos."""
    if isinstance(content, list):  # a part of text has no marks
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict)).strip()
    return without_marks(content).strip() if isinstance(content, str) else ""


def marked(text: str, num_images: int, num_videos: int) -> str:
    """The content of a message: marks for those pictures and videos that have none in ``text`` come first.

    Without pictures (videos), <image> (<video>) in the text is a word.
    """
    marks = ""
    for kind, count in (("image", num_images), ("video", num_videos)):
        if count:
            marks += f"<{kind}>" * (count - num_marks(text, kind))
        else:
            text = escaped(text, kind)
    return marks + text
