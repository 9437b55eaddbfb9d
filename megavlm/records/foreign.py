"""Records as public data sets have them, converted to megavlm's own forms (see ``records``, ``preference``).

Each form is recognised by its fields alone, and its conversion is a pure function of the record. A record of none of
these forms stays as it is. Fields that a conversion does not use stay, too, because rewards may read them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megavlm.base.json_files import parse_json
from megavlm.records.choices import choices_of
from megavlm.records.forms import form_of
from megavlm.records.marks import escaped, num_marks
from megavlm.records.numbered import has_numbered_mark, in_order, is_numbered, numbered_pictures

# The fields in which public data sets name pictures and videos. The first one that is not empty counts.
_PICTURES = ("images", "image", "imgname", "img", "image_path", "image_file", "file_name")
_VIDEOS = ("videos", "video", "video_path")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
_ANSWERS = ("answer", "answers", "multiple_choice_answer", "label")
_READ = ("judged", "conversation", "document", "question")  # megavlm's own forms, whatever else is in the record
_CAPTIONS = ("text", "caption", "captions")


@dataclass(frozen=True)
class Form:
    """A form of foreign records.

    Attributes:
        name: what it is called in messages.
        matches: whether a record has this form, judging by its fields.
        convert: the record in megavlm's own form; it may raise what wrong types in the fields lead to.
    """

    name: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict], dict]


def foreign_form(raw: Any) -> Form | None:
    """The form of a parsed line; None if it is one of megavlm's own, or unknown."""
    form = next((form for form in FORMS if form.matches(raw)), None) if isinstance(raw, dict) else None
    if form is None or not numbered_pictures(raw):
        return form
    return replace(form, name=f"{form.name}, with pictures in the fields image_1, image_2, …")


def _conversations(raw: dict) -> dict:
    """LLaVA, ShareGPT: ``{"conversations": [{"from": "human", "value": …}, …], "image"?, "system"?, "tools"?}``."""
    messages = [_message(turn) for turn in raw["conversations"]]
    if isinstance(raw.get("system"), str) and raw["system"]:
        messages.insert(0, {"role": "system", "content": raw["system"]})
    found: dict[str, Any] = {"messages": messages}
    if "chosen" in raw and "rejected" in raw:
        found |= {name: _answer_turns(raw[name]) for name in ("chosen", "rejected")}
    tools = raw.get("tools")
    if isinstance(tools, str):  # LLaMA-Factory has them as JSON in a string
        tools = parse_json(tools) if tools.strip() else None
    return _finished(raw, ("conversations", "system", "tools"), found | ({"tools": tools} if tools else {}))


def _cauldron(raw: dict) -> dict:
    """The Cauldron: ``{"images": […], "texts": [{"user": …, "assistant": …, "source": …}, …]}``."""
    messages = [
        {"role": role, "content": turn[role]}
        for turn in raw["texts"]
        for role in ("system", "user", "assistant")
        if turn.get(role)
    ]
    return _finished(raw, ("texts",), {"messages": messages})


def _query(raw: dict) -> dict:
    """ms-swift: ``{"query", "response", "history"?: [[query, response], …], "system"?, "rejected_response"?}``."""
    return _asked(raw, "query", raw["query"], raw["response"], raw.get("rejected_response"))


def _alpaca(raw: dict) -> dict:
    """Alpaca: ``{"instruction", "input"?, "output", "system"?, "history"?}``, or ``chosen`` and ``rejected``."""
    question = "\n".join(text for text in (raw["instruction"], raw.get("input")) if text)
    answer, rejected = raw.get("output", raw.get("chosen")), raw.get("rejected")
    if isinstance(answer, list) and len(answer) == 2:  # the better answer and the worse one
        answer, rejected = answer
    return _asked(raw, "instruction", question, answer, rejected)


def _asked(raw: dict, field: str, question: str, answer: Any, rejected: Any) -> dict:
    messages = [{"role": "system", "content": raw["system"]}] if raw.get("system") else []
    for past, reply in raw.get("history") or []:
        messages += [{"role": "user", "content": past}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": question})
    used = (field, "input", "output", "response", "rejected_response", "chosen", "rejected", "system", "history")
    if rejected is not None:
        return _finished(raw, used, {"messages": messages, "chosen": answer, "rejected": rejected})
    return _finished(raw, used, {"messages": [*messages, {"role": "assistant", "content": answer}]})


def _pair(raw: dict) -> dict:
    """Pairs with a ``question`` or one ``image`` (RLAIF-V, MMPR), or ``messages`` beside the prompt (UltraFeedback)."""
    field = next((name for name in ("prompt", "messages", "question") if name in raw), None)
    if field is None:  # the answers are whole conversations
        return _finished(raw, (), {})
    return _finished(
        raw,
        ("prompt", "messages", "question"),
        {"prompt": raw[field], "chosen": raw["chosen"], "rejected": raw["rejected"]},
    )


def _text_pair(raw: dict) -> dict:
    """RLHF-V: ``{"image", "text": "{\\"question\\": …, \\"chosen\\": …, \\"rejected\\": …}", …}``."""
    return _pair({name: value for name, value in raw.items() if name != "text"} | parse_json(raw["text"]))


def _preferred(raw: dict) -> dict:
    """OpenAI: ``{"input": {"messages": …, "tools"?}, "preferred_output": …, "non_preferred_output": …}``."""
    found = {"prompt": raw["input"]["messages"], "chosen": raw["preferred_output"]}
    tools = {"tools": raw["input"]["tools"]} if raw["input"].get("tools") else {}
    used = ("input", "preferred_output", "non_preferred_output")
    return _finished(raw, used, found | {"rejected": raw["non_preferred_output"]} | tools)


def _completed(raw: dict) -> dict:
    """TRL's prompt and completion, each a text or messages: only the completion is learned."""
    prompt = _turns(raw["prompt"], "user")
    prompt = [turn | {"loss": False} if turn.get("role") == "assistant" else turn for turn in prompt]
    answer = _turns(raw["completion"], "assistant")
    return _finished(raw, ("prompt", "completion"), {"messages": [*prompt, *answer]})


def _question(raw: dict) -> dict:
    """Questions about pictures: ``{"question" or "query", "answer" or "answers", "choices"?, "image"?}``.

    ``answer`` is the first of several. Choices get letters, and the answer is then one of these. ValueError if there
    are pictures or choices that would not be shown.
    """
    field = "question" if "question" in raw else "query"
    answer = next(raw[name] for name in _ANSWERS if raw.get(name) not in (None, []))
    answer = answer[0] if isinstance(answer, list) else answer
    answer = answer["answer"] if isinstance(answer, dict) else answer
    choices = choices_of(raw)
    question = "\n".join([raw[field], *(f"{letter}. {choice}" for letter, choice in choices.items())])
    if choices:
        letters, texts = list(choices), list(choices.values())
        if answer in texts:
            answer = letters[texts.index(answer)]
        elif answer not in letters and str(answer).isdecimal():
            answer = letters[int(answer)]
    elif "A" in raw and "B" in raw and len(str(answer)) == 1:
        raise ValueError("the choices are in the fields A, B, …: write them as a list, choices")
    if has_numbered_mark(question) and not numbered_pictures(raw):
        raise ValueError("its marks name pictures by numbers, but there are no fields image_1, image_2, …")
    return _finished(raw, (field, "choices", "options"), {"problem": question, "answer": answer})


def _caption(raw: dict) -> dict:
    """Pictures with a ``text`` or ``caption`` (the first of several): a document of the picture and the text."""
    field = next(name for name in _CAPTIONS if raw.get(name))
    text = raw[field][0] if isinstance(raw[field], list) else raw[field]
    return _finished(raw, _CAPTIONS, {"text": text})


def _one_picture(raw: dict) -> dict:
    """megavlm's own forms with one ``image`` or ``video`` in place of a list."""
    return _finished(raw, (), {name: raw[name] for name in ("messages", "prompt", "problem") if name in raw})


def _message(turn: dict) -> dict:
    """A turn ``{"from", "value"}`` or ``{"role", "content"}`` as a message; an unknown role stays, and is refused."""
    role = turn["from"] if "from" in turn else turn["role"]
    rest = {name: turn[name] for name in ("loss", "weight", "tool_calls") if name in turn}
    return {"role": _ROLES.get(role, role), "content": turn["value"] if "value" in turn else turn["content"], **rest}


def _answer_turns(answer: Any) -> Any:
    if isinstance(answer, list):
        return [_message(turn) for turn in answer]
    return _message(answer) if isinstance(answer, dict) else answer


def _turns(said: Any, role: str) -> list[dict]:
    return [{"role": role, "content": said}] if isinstance(said, str) else [said] if isinstance(said, dict) else said


def _listed(raw: dict, names: tuple[str, ...]) -> list:
    """The pictures or videos of a record: paths, or {"path": …} as data sets of Hugging Face have them."""
    name = next((name for name in names if raw.get(name) not in (None, "", [])), None)
    if name is None:
        return []
    is_list = isinstance(raw[name], list) and name != "video"  # a list of frames is one video
    return [
        item["path"] if isinstance(item, dict) and item.get("path") else item
        for item in (raw[name] if is_list else [raw[name]])
    ]


def _finished(raw: dict, used: tuple[str, ...], found: dict[str, Any]) -> dict:
    """The converted record: what was found, the media as lists with a mark for each, and all fields not used."""
    listed = {"images": _listed(raw, _PICTURES), "videos": _listed(raw, _VIDEOS)}
    numbered = {} if listed["images"] else numbered_pictures(raw)
    gone = {*used, *found, *_PICTURES, *_VIDEOS, *filter(is_numbered, raw)}
    rest = {name: value for name, value in raw.items() if name not in gone}
    for field in ("messages", "prompt", "problem", "text"):
        if field in found:
            said = found[field]
            if numbered:
                said, listed["images"] = in_order(said, numbered)
            found = found | {field: _marked(said, listed)}
            break
    media = {name: files for name, files in listed.items() if files}
    return {**rest, **found, **media}


def _marked(said: Any, listed: dict[str, list]) -> Any:
    """The prompt, conversation or text with a mark for each picture and video.

    Where there are no marks, they come first, as everywhere in these data sets. A video may have the mark <image>, as
    in LLaVA-Video. Once the questions have all marks, those in answers are words.
    """
    if isinstance(said, str):
        return _marked([{"role": "user", "content": said}], listed)[0]["content"]
    if any(not isinstance(turn.get("content"), str) for turn in said):
        return said  # lists of parts have their media in place
    turns = [dict(turn) for turn in said]
    asking = [turn for turn in turns if turn.get("role") != "assistant"]
    counted = lambda kind: sum(num_marks(turn["content"], kind) for turn in asking)
    if listed["videos"] and not listed["images"] and not counted("video") and counted("image"):
        for turn in asking:
            turn["content"] = turn["content"].replace("<image>", "<video>")
    for kind in ("video", "image"):
        count, first = len(listed[kind + "s"]), next((t for t in asking if t.get("role") == "user"), None)
        if count and first is not None and not counted(kind):
            first["content"] = f"<{kind}>" * count + first["content"]
        if count and counted(kind) == count:
            for turn in turns:
                if turn.get("role") == "assistant":
                    turn["content"] = escaped(turn["content"], kind)
    return turns


def _has(*names: str) -> Callable[[dict], bool]:
    return lambda raw: all(name in raw for name in names)


def _has_turns(name: str) -> Callable[[dict], bool]:
    return lambda raw: isinstance(raw.get(name), list) and bool(raw[name]) and form_of(raw) not in _READ


def _has_picture(raw: dict) -> bool:
    return any(raw.get(name) not in (None, "", []) for name in (*_PICTURES, *_VIDEOS)) or bool(numbered_pictures(raw))


def _is_question(raw: dict) -> bool:
    asks = "question" in raw or ("query" in raw and _has_picture(raw))
    return asks and any(raw.get(name) not in (None, []) for name in _ANSWERS) and form_of(raw) is None


def _is_query(raw: dict) -> bool:
    return "query" in raw and "response" in raw and form_of(raw) is None


def _is_alpaca(raw: dict) -> bool:
    """Alpaca itself has ``text``, too, with all that the other fields say."""
    if not ("instruction" in raw and "output" in raw):
        return False
    return form_of(raw) is None or (form_of(raw) == "document" and str(raw["output"]) in str(raw["text"]))


def _is_alpaca_pair(raw: dict) -> bool:
    return all(name in raw for name in ("instruction", "chosen", "rejected")) and not _is_asked(raw)


def _is_completed(raw: dict) -> bool:
    return "prompt" in raw and "completion" in raw and "label" not in raw and "messages" not in raw


def _is_asked(raw: dict) -> bool:
    return "prompt" in raw or "messages" in raw


def _is_caption(raw: dict) -> bool:
    if form_of(raw) is None:
        return _has_picture(raw) and any(raw.get(name) for name in _CAPTIONS)
    named = str(raw.get("file_name")).lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".gif"))
    return form_of(raw) == "document" and isinstance(raw["text"], str) and (_is_single(raw) or named)


def _is_foreign_pair(raw: dict) -> bool:
    if not ("chosen" in raw and "rejected" in raw):
        return False
    return ("question" in raw and not _is_asked(raw)) or _is_single(raw) or ("prompt" in raw and "messages" in raw)


def _is_single(raw: dict) -> bool:
    """Whether pictures or videos are named by a field that megavlm does not have."""
    if "images" in raw or "videos" in raw:
        return False
    return any(raw.get(name) for name in ("image", "video")) or bool(numbered_pictures(raw))


FORMS = (
    Form("OpenAI preferences", _has("input", "preferred_output", "non_preferred_output"), _preferred),
    Form("LLaVA or ShareGPT conversations", _has_turns("conversations"), _conversations),
    Form("The Cauldron", _has_turns("texts"), _cauldron),
    Form("query and response (ms-swift)", _is_query, _query),
    Form("Alpaca", _is_alpaca, _alpaca),
    Form("Alpaca pairs", _is_alpaca_pair, _alpaca),
    Form("pairs as UltraFeedback and RLAIF-V have them", _is_foreign_pair, _pair),
    Form(
        "pairs as RLHF-V has them",
        lambda raw: (
            isinstance(text := raw.get("text"), str)
            and text.startswith("{")
            and '"rejected"' in text
            and _is_single(raw)
        ),
        _text_pair,
    ),
    Form("prompt and completion (TRL)", _is_completed, _completed),
    Form("questions and answers", _is_question, _question),
    Form("captions", _is_caption, _caption),
    Form(
        "one image or video per record",
        lambda raw: _is_single(raw) and any(name in raw for name in ("messages", "prompt", "problem")),
        _one_picture,
    ),
)
"""All forms; the first one that a record has counts."""
