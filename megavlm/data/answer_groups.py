"""The units of the packing buffer: a single sample, or several answers to one prompt that must share a row."""

from megavlm.base.errors import UserError
from megavlm.data.preference import split_judgement, split_pair, with_answer_of
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, Renderer
from megavlm.data.row import Annotations
from megavlm.data.sources import SampleFile


def likely_kind(file: SampleFile, otherwise: Kind) -> Kind:
    """The kind of a file judging by its first sample: "pair", "judged", or ``otherwise`` if it is neither."""
    try:
        record = file.read(0)[0]
    except UserError:
        return otherwise
    fields = record if isinstance(record, dict) else {}
    return "pair" if "chosen" in fields else "judged" if "completion" in fields else otherwise


def draft_unit(renderer: Renderer, file: SampleFile, index: int, kind: Kind) -> Draft:
    """The draft of sample `index`, with ``followers`` for the kinds "pair" and "judged".

    For a pair, the draft has the chosen answer and its follower has the rejected one. The follower of a judged sample
    has the same prompt with the answer of the next sample in the file, if that answer differs.

    Raises UserError if the sample cannot be used.
    """
    source = file.source(index)
    record, find = file.read(index)
    if kind not in ("pair", "judged"):
        return renderer.draft(record, find, source, kind=kind, index=index)
    if kind == "pair":
        first, second, margin = split_pair(record, source)
        draft = renderer.draft(first, find, source, kind="tune", index=index)
        follower = renderer.draft(second, find, source, kind="tune", index=index)
        _follow(renderer, draft, follower, Annotations(side="rejected"))
        draft.annotations = Annotations(side="chosen", margin=margin)
    else:
        first, desirable = split_judgement(record, source)
        draft = renderer.draft(first, find, source, kind="tune", index=index)
        try:
            other = file.read((index + 1) % len(file))[0]
            if (mismatched := with_answer_of(record, other, source)) is not None:
                follower = renderer.draft(mismatched, find, source, kind="tune", index=index)
                _follow(renderer, draft, follower, Annotations(mismatched=True))
        except UserError:
            draft.followers = []  # the next sample is invalid or does not fit, but the sample itself can be used
        draft.annotations = Annotations(desirable=desirable)
    return draft


def _follow(renderer: Renderer, draft: Draft, follower: Draft, annotations: Annotations) -> None:
    if follower.frame_grids.tolist() != draft.frame_grids.tolist():
        raise UserError(f"{draft.source}: an answer contains pictures or videos", "move them into the prompt")
    follower.shares_media, follower.annotations = True, annotations
    draft.followers = [follower]
    renderer.check_size(draft)
