"""What takes one place in the packing buffer: a sample, or answers to one prompt that must share a row."""

from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.preference import split_judgement, split_pair
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, Renderer

if TYPE_CHECKING:
    from megavlm.data.sources import SampleFile


def likely_kind(file: "SampleFile", otherwise: Kind) -> Kind:
    """What the first sample of a file looks like: a pair, a judged answer, or what it is ``otherwise``."""
    try:
        record = file.read(0)[0]
    except UserError:
        return otherwise
    fields = record if isinstance(record, dict) else {}
    return "pair" if "chosen" in fields else "judged" if "completion" in fields else otherwise


def draft_unit(renderer: Renderer, file: "SampleFile", index: int, kind: Kind) -> Draft:
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
        first, second, facts = split_pair(record, source)
        side = {"side": "rejected"}
    else:
        neighbour = file.read((index + 1) % len(file))[0]
        first, second, facts = split_judgement(record, neighbour, source)
        side = {"mismatched": True}
    draft = renderer.draft(first, find, source, kind="tune", index=index)
    draft.facts = facts
    if second is not None:
        follower = renderer.draft(second, find, source, kind="tune", index=index)
        follower.shares_media, follower.facts = True, side
        assert follower.frame_grids.tolist() == draft.frame_grids.tolist()
        draft.followers = [follower]
        renderer.check_size(draft)
    return draft
