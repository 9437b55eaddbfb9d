"""Converts records that ask a question, ``{"prompt" or "problem": …, "images"?, …}``, to conversations."""

from typing import Any

from megavlm.base.errors import UserError
from megavlm.records.values import check_values

ASKING = ("prompt", "problem")
_ANSWERING = ("answer", "solution")


def as_conversation(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The record with its prompt as ``messages``; a record that has messages or a text is returned as it is.

    A prompt is a string, in which ``<image>`` and ``<video>`` mark the places of the media, or a list of messages.

    Args:
        raw: the parsed line.
        source: "file:line", for error messages.

    Raises:
        UserError: the record has both fields, or the prompt is neither a string nor a list.
    """
    found = [name for name in ASKING if name in raw]
    if not found or "messages" in raw or "text" in raw:
        return raw
    if len(found) > 1:
        raise UserError(f"{source}: the record has both {' and '.join(found)}", "give it one of them")
    prompt = raw[found[0]]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UserError(f"{source}: {found[0]} must be a string or a list of messages")
    return {**{name: value for name, value in raw.items() if name != found[0]}, "messages": prompt}


def with_answer(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """A question that has an ``answer`` or ``solution`` as a conversation to be learned; other records as they are.

    Arguments and errors are those of ``as_conversation``.
    """
    field = next((name for name in _ANSWERING if isinstance(raw.get(name), str | int | float)), None)
    if field is None or "messages" in raw or "text" in raw or "completion" in raw or not any(n in raw for n in ASKING):
        return raw
    check_values(raw, (*ASKING, field), source)
    asked = as_conversation(raw, source)
    return {**asked, "messages": [*asked["messages"], {"role": "assistant", "content": str(raw[field])}]}
