"""Converts preference records to records of conversations that differ only in the last answer.

Pairs: ``{"prompt" or "messages", "chosen", "rejected", "margin"?, "images"?, …}``. Single judgements (KTO):
``{"prompt" or "messages", "completion", "label": true or false, …}``. An answer is a string, a message, or a list of
messages, without the prompt (see ``repeated_prompt``). ``rejected`` may also be a list of strings or of lists of
messages: several rejected answers. Media belong to the prompt.
"""

from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.records.forms import other_form
from megavlm.records.values import field_names, is_number

PAIR_FIELDS = ("prompt", "chosen", "rejected", "margin")
KTO_FIELDS = ("prompt", "completion", "label")


def split_pair(raw: Any, source: str) -> tuple[dict, dict, float]:
    """The conversation with the chosen answer, the one with the rejected answer, and the pair's margin.

    Raises UserError if the record is not a valid pair.
    """
    _check_form(raw, "pair", ("chosen", "rejected"), source)
    prompt, rest = _prompt(raw, PAIR_FIELDS, source)
    chosen, rejected = (_answer(raw, name, source) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise UserError(f"{source}: chosen and rejected are equal, so neither is preferred", "remove the sample")
    margin = raw.get("margin", 0.0)
    if not is_number(margin):
        raise UserError(f"{source}: margin must be a number, found {quoted(margin)}", "give a number, or omit margin")
    return {**rest, "messages": [*prompt, *chosen]}, {**rest, "messages": [*prompt, *rejected]}, float(margin)


def single_pairs(raw: Any) -> list[Any]:
    """The record once for each of its rejected answers, with this answer alone; most often the record itself."""
    rejected = raw.get("rejected") if isinstance(raw, dict) else None
    if isinstance(rejected, list) and rejected and all(isinstance(answer, str | list) for answer in rejected):
        return [{**raw, "rejected": answer} for answer in rejected]
    return [raw]


def split_judgement(raw: Any, source: str) -> tuple[dict, bool]:
    """The conversation with the judged answer, and whether that is desirable.

    Raises UserError if the record is not a valid judgement.
    """
    _check_form(raw, "judged", ("completion",), source)
    prompt, rest = _prompt(raw, KTO_FIELDS, source)
    answer = _answer(raw, "completion", source)
    if not isinstance(raw.get("label"), bool):
        found = quoted(raw["label"]) if "label" in raw else "none"
        raise UserError(f"{source}: label must be true (desirable) or false, found {found}", "give each sample a label")
    return {**rest, "messages": [*prompt, *answer]}, raw["label"]


def with_answer_of(raw: Any, other: Any, source: str) -> dict | None:
    """The prompt of a judged sample with the answer of another sample; None if both answers are the same.

    Such mismatched pairs estimate the KL term of KTO: how much more likely the policy makes an arbitrary answer to
    this prompt.

    Raises UserError if the other sample has no answer.
    """
    prompt, rest = _prompt(raw, KTO_FIELDS, source)
    foreign = _answer(other if isinstance(other, dict) else {}, "completion", source)
    if foreign == _answer(raw, "completion", source):
        return None
    foreign = [{n: v for n, v in message.items() if n not in ("loss", "weight")} for message in foreign]
    return {**rest, "messages": [*prompt, *foreign]}


def _check_form(raw: Any, form: str, fields: tuple[str, ...], source: str) -> None:
    """Raises a UserError that says what the record looks like if it lacks fields of its form."""
    if isinstance(raw, dict) and (missing := [name for name in fields if name not in raw]):
        raise other_form(raw, form, missing, source)


def _prompt(raw: Any, fields: tuple[str, ...], source: str) -> tuple[list[dict], dict]:
    """The prompt's messages, all excluded from the loss, and the record's other fields (media, tools)."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a line must be a JSON object")
    if ("prompt" in raw) == ("messages" in raw):
        found = "both" if "prompt" in raw else f"neither (fields: {field_names(raw)})"
        raise UserError(
            f"{source}: a sample must have either prompt or messages; this one has {found}",
            f"write {{{', '.join(f'{name!r}: …' for name in fields if name != 'margin')}}}".replace("'", '"'),
        )
    prompt = raw.get("messages", raw.get("prompt"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        raise UserError(f"{source}: the prompt must be a string or a list of messages")
    if prompt[-1].get("role") == "assistant":
        raise UserError(f"{source}: the prompt ends with an assistant message", "move that message into the answers")
    unlearned = [m | {"loss": False} if m.get("role") == "assistant" else m for m in prompt]
    return unlearned, {name: value for name, value in raw.items() if name not in (*fields, "messages")}


def _answer(raw: Any, name: str, source: str) -> list[dict]:
    answer = raw.get(name)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    elif isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, list) or not all(isinstance(message, dict) for message in answer):
        raise UserError(f"{source}: {name} must be a string, a message or a list of messages", f"add {name}")
    if not any(m.get("content") or m.get("tool_calls") for m in answer if m.get("role") == "assistant"):
        raise UserError(f"{source}: {name} is empty", "give the answer, or remove the sample")
    if answer[0].get("role") in ("system", "user"):
        raise UserError(
            f"{source}: {name} begins with a {answer[0]['role']} message that is not the prompt",
            "leave the prompt out of the answers, or write it there as it is in prompt",
        )
    return answer
