"""What takes one place in the packing buffer: a sample, or answers to one prompt that must share a row."""

from megavlm.base.errors import UserError
from megavlm.data.preference import split_judgement, split_pair, with_answer_of
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, Renderer
from megavlm.data.row import Annotations
from megavlm.data.sources import SampleFile


def likely_kind(file: SampleFile, otherwise: Kind) -> Kind:
    """What the first sample of a file looks like: a pair, a judged answer, or what it is ``otherwise``."""
    try:
        record = file.read(0)[0]
    except UserError:
        return otherwise
    fields = record if isinstance(record, dict) else {}
    return "pair" if "chosen" in fields else "judged" if "completion" in fields else otherwise


def draft_unit(renderer: Renderer, file: SampleFile, index: int, kind: Kind) -> Draft:
    """The draft of sample `index`; with ``followers`` for the kinds "pair" and "judged".

    A pair is its chosen answer and, behind it, the rejected one. A judged sample is followed by the same prompt with
    the answer of the next sample in the file, if there is one that differs.

    Raises UserError for what cannot be used.
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
            if (second := with_answer_of(record, other, source)) is not None:
                follower = renderer.draft(second, find, source, kind="tune", index=index)
                _follow(renderer, draft, follower, Annotations(mismatched=True))
        except UserError:
            draft.followers = []  # the neighbour, or the two together, are of no use; the sample itself is
        draft.annotations = Annotations(desirable=desirable)
    return draft


def _follow(renderer: Renderer, draft: Draft, follower: Draft, annotations: Annotations) -> None:
    if follower.frame_grids.tolist() != draft.frame_grids.tolist():
        raise UserError(f"{draft.source}: an answer has pictures or videos of its own", "move them into the prompt")
    follower.shares_media, follower.annotations = True, annotations
    draft.followers = [follower]
    renderer.check_size(draft)
