"""The units of the packing buffer: a single sample, or several answers to one prompt that must share a row."""

from typing import Any

from megavlm.base.errors import UserError
from megavlm.data.draft import Draft
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Asked
from megavlm.records.forms import form_of
from megavlm.records.preference import single_pairs, split_judgement, split_pair, with_answer_of
from megavlm.records.questions import question_of, reference_of
from megavlm.records.records import FIELDS, Kind, check_record
from megavlm.records.remarks import REPEATED_PROMPT
from megavlm.records.repeated_prompt import without_repeated_prompt
from megavlm.records.values import check_values
from megavlm.sources.blend import SampleFile


def likely_kind(file: SampleFile, otherwise: Kind) -> Kind:
    """The kind of a file judging by its first sample: "pair", "judged", or ``otherwise`` if it is neither."""
    try:
        record = file.read(0)[0]
    except UserError:
        return otherwise
    form = form_of(record)
    return "pair" if form == "pair" else "judged" if form == "judged" else otherwise


def draft_unit(renderer: Renderer, file: SampleFile, index: int, kind: Kind) -> Draft:
    """The draft of sample `index`, with ``followers`` for the kinds "pair" and "judged".

    A prompt has the fields of its record, for rewards, and must fit in a row.
    For a pair, the draft has the chosen answer and its followers the rejected ones. The follower of a judged sample
    has the same prompt with the answer of the next sample in the file, if that answer differs.

    Raises UserError if the sample cannot be used.
    """
    source = file.source(index)
    record, find = file.read(index)
    if kind == "prompt":
        draft = renderer.draft(record, find, source, kind=kind, index=index)
        renderer.check_length(draft)
        checked = check_record(record, kind, source)
        media, answer = [*checked.images, *checked.videos], record.get("answer")
        reference = str(answer) if isinstance(answer, str | int | float) else reference_of(record)  # as for rewards
        asked = Asked(columns=record, question=question_of(checked), media=media, reference=reference)
        draft.annotations = Annotations(asked=asked)
        return draft
    if kind not in ("pair", "judged"):
        return renderer.draft(record, find, source, kind=kind, index=index)
    if kind == "pair":
        pairs = [_plain(one, kind, source) for one in single_pairs(record)]
        repeats = any(repeated for _, repeated in pairs)
        for number, (pair, _) in enumerate(pairs):
            first, second, margin = split_pair(pair, source)
            if number == 0:
                draft = renderer.draft(first, find, source, kind="tune", index=index)
                draft.annotations = Annotations(side="chosen", margin=margin)
            follower = renderer.draft(second, find, source, kind="tune", index=index)
            _follow(renderer, draft, follower, Annotations(side="rejected", number=number))
    else:
        record, repeats = _plain(record, kind, source)
        first, desirable = split_judgement(record, source)
        draft = renderer.draft(first, find, source, kind="tune", index=index)
        try:
            other, _ = _plain(file.read((index + 1) % len(file))[0], kind, source)
            if (mismatched := with_answer_of(record, other, source)) is not None:
                follower = renderer.draft(mismatched, find, source, kind="tune", index=index)
                _follow(renderer, draft, follower, Annotations(mismatched=True))
        except UserError:
            draft.followers = []  # the next sample is invalid or does not fit, but the sample itself can be used
        draft.annotations = Annotations(desirable=desirable)
    if repeats:
        draft.remarks = (*draft.remarks, REPEATED_PROMPT)
    return draft


def separate_answers(record: Any, source: str) -> list[tuple[str | None, Any]]:
    """The answers of a record by their side: ("chosen", …) and ("rejected", …) of a pair, or (None, the record itself).

    Raises UserError if the record is a pair that cannot be used.
    """
    if form_of(record) != "pair":
        return [(None, record)]
    if len(single_pairs(record)) > 1:
        raise UserError(f"{source}: several rejected answers are only for training", "write a line for each of them")
    chosen, rejected, _ = split_pair(_plain(record, "pair", source)[0], source)
    return [("chosen", chosen), ("rejected", rejected)]


def _plain(record: Any, kind: Kind, source: str) -> tuple[Any, bool]:
    """The record without the prompt in its answers, and whether they had it."""
    answers = ("chosen", "rejected") if kind == "pair" else ("completion",)
    if isinstance(record, dict):  # values that are nested too deeply cannot be compared
        check_values(record, (*FIELDS, "prompt", *answers), source)
    return without_repeated_prompt(record, answers)


def _follow(renderer: Renderer, draft: Draft, follower: Draft, annotations: Annotations) -> None:
    if follower.frame_grids.tolist() != draft.frame_grids.tolist():
        raise UserError(f"{draft.source}: an answer contains pictures or videos", "move them into the prompt")
    follower.shares_media, follower.annotations = True, annotations
    draft.followers = [*draft.followers, follower]
    renderer.check_size(draft)
