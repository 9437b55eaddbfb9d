"""What form a record has, and what to say of one that has another form than a verb reads."""

from collections.abc import Sequence
from typing import Any

from megavlm.base.errors import UserError
from megavlm.records.values import field_names

# Each form: the fields by which it is recognised, and what it is.
_FORMS = {
    "pair": (("chosen", "rejected"), "a pair of answers, which dpo and rm read"),
    "judged": (("completion",), "a labelled answer, which kto reads"),
    "conversation": (("messages",), "a conversation, which sft reads"),
    "document": (("text",), "a document, which pretrain and sft read"),
    "question": (("prompt", "problem"), "a question, which grpo and infer read"),
    "sharegpt": (("conversations",), "a conversation as ShareGPT and LLaVA write it"),
}
# How the forms are written that verbs read.
_WRITTEN = {
    "pair": '{"prompt": "<image>…", "chosen": "…", "rejected": "…", "images": […]}',
    "judged": '{"prompt": "<image>…", "completion": "…", "label": true, "images": […]}',
    "messages": '{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}], '
    '"images": […]}',
}


def form_of(raw: Any) -> str | None:
    """The form of a parsed line by the names of its fields: "pair", "judged", "conversation", …; None if unknown."""
    fields = raw if isinstance(raw, dict) else {}
    return next((form for form, (names, _) in _FORMS.items() if any(name in fields for name in names)), None)


def other_form(raw: dict, wanted: str, missing: Sequence[str], source: str) -> UserError:
    """The error for a record without fields that its form must have.

    Args:
        raw: the record.
        wanted: the form that is read: "pair", "judged" or "messages" (a conversation or a document).
        missing: the names of the missing fields; for "messages", both messages and text are missing.
        source: "file:line".
    """
    form = form_of(raw)
    remedy = f"write {_WRITTEN[wanted]}"
    if form == wanted:
        looks = ""
    elif form is None:
        looks = "; the record has no form that megavlm knows"
    else:
        looks = f"; the record is {_FORMS[form][1]}"
        remedy += "" if form == "sharegpt" else ", or use the verb that reads this form"
    lacks = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if wanted == "messages":
        lacks = "a sample must have either messages or text; this one has neither"
    return UserError(f"{source}: {lacks}{looks} (fields: {field_names(raw)})", remedy)
