"""Finds the prompt that many public preference data sets repeat in each answer, and removes it from the answers.

Their forms: whole conversations as answers, without a prompt; whole conversations beside a prompt, which is a text or
messages (and may lack the system message with which the conversations begin); texts that begin with the prompt's text.
"""

from collections.abc import Sequence
from typing import Any

_LEAST_TEXT = 32  # characters of a prompt that a text may repeat; an answer to "Hello" may well begin with "Hello"
_QUESTION_MARKS = ("?", "？", "؟")  # a question of any length is repeated if each of several answers begins with it


def without_repeated_prompt(raw: Any, answers: Sequence[str]) -> tuple[Any, bool]:
    """The record with a prompt that its answers do not repeat, and whether they did; other records as they are.

    Args:
        raw: the parsed line.
        answers: the names of the fields with answers.
    """
    names = [name for name in answers if isinstance(raw, dict) and raw.get(name)]
    field = next((name for name in ("prompt", "messages") if names and name in raw), None)
    talks = {name: raw[name] for name in names if _is_talk(raw[name])}
    if field is None:
        length = _shared_length(list(talks.values())) if len(talks) == len(names) else 0
        if not length:
            return raw, False
        prompt = talks[names[0]][:length]
        return raw | {"prompt": prompt} | {name: talk[length:] for name, talk in talks.items()}, True
    prompt = raw[field]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not _is_talk(prompt):
        return raw, False
    found = {name: place for name, talk in talks.items() if (place := _place_of(prompt, talk)) is not None}
    if found:
        # A system message that stands in the answers alone belongs to the prompt. It is the same in both, or none's.
        leads = [talks[name][:place] for name, place in found.items()]
        if all(_are_same(lead, leads[0]) for lead in leads):
            shorter = {name: talks[name][place + len(prompt) :] for name, place in found.items()}
            return raw | {field: [*leads[0], *prompt]} | shorter, True
    text = prompt[-1].get("content")
    text = text.strip() if isinstance(text, str) else ""
    if len(text) >= _LEAST_TEXT or (len(names) > 1 and text.endswith(_QUESTION_MARKS)):
        rests = {name: _after(text, raw[name]) for name in names}
        if all(rests.values()):
            return raw | rests, True
    return raw, False


def _after(text: str, answer: Any) -> str:
    """What follows a text in an answer that begins with it; "" if it does not."""
    answer = answer.lstrip() if isinstance(answer, str) else ""
    return answer[len(text) :].lstrip() if answer.startswith(text) else ""


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _place_of(prompt: list[dict], talk: list[dict]) -> int | None:
    """Where the prompt begins in a conversation that goes on after it: at its start or after a system message."""
    places = (0, 1) if talk[0].get("role") == "system" else (0,)
    for place in places:
        if len(talk) > place + len(prompt) and _are_same(prompt, talk[place : place + len(prompt)]):
            return place
    return None


def _shared_length(talks: list[list[dict]]) -> int:
    """The number of messages of the prompt with which whole conversations begin; 0 if they have none.

    It ends before the first difference, or in a single conversation with the last message of the user.
    """
    if len(talks) == 1:
        roles = [message.get("role") for message in talks[0]]
        return len(roles) - roles[::-1].index("user") if "user" in roles[:-1] and roles[-1] != "user" else 0
    length = 0
    for messages in zip(*(talk[:-1] for talk in talks), strict=False):
        if not all(_are_same(messages[:1], [message]) for message in messages):
            break
        length += 1
    while length and talks[0][length - 1].get("role") == "assistant":
        length -= 1
    return length


def _are_same(first: Sequence[dict], second: Sequence[dict]) -> bool:
    """Whether messages say the same, however they are written."""
    return len(first) == len(second) and all(_plain(a) == _plain(b) for a, b in zip(first, second, strict=True))


def _plain(message: dict) -> dict:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if isinstance(content, str):
        content = content.strip()
    return {name: value for name, value in message.items() if name not in ("loss", "weight")} | {"content": content}
