"""Whether a record has a form that any verb reads, whatever its media and its length."""

from typing import Any

from megavlm.base.errors import UserError
from megavlm.records.forms import form_of
from megavlm.records.preference import split_judgement, split_pair
from megavlm.records.records import check_record


def check_usable(raw: Any, source: str) -> None:
    """Raises UserError, as the verb for records of this form would, if no verb can use the record.

    Args:
        raw: the parsed line.
        source: "file:line", for error messages.
    """
    form = form_of(raw)
    if form == "pair":
        first, second, _ = split_pair(raw, source)
        check_record(first, "tune", source)
        check_record(second, "tune", source)
    elif form == "judged":
        check_record(split_judgement(raw, source)[0], "tune", source)
    else:
        try:
            check_record(raw, "tune", source)
        except UserError:
            try:
                check_record(raw, "pretrain", source)
                return
            except UserError:
                check_record(raw, "prompt", source)
