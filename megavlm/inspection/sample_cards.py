"""A sample for the page of `megavlm data inspect`: its pictures, and its text with the loss weight of each token."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from megavlm.data.draft import Draft
from megavlm.data.processor import Clip, Still
from megavlm.data.renderer import Renderer
from megavlm.inspection.data_stats import num_targets
from megavlm.report.answers import thumbnail

MAX_PIECES = 2400  # number of pieces of text of one sample on the page, such that a phone can display it
MAX_FRAMES = 4  # number of frames of one video on the page
MAX_MEDIA = 12  # number of pictures and videos of one sample on the page
_LEAST_LOSS = 1e-6  # a target whose loss is 0 is a target
LEVELS = {1: "¼ or less", 2: "½", 3: "1", 4: "2", 5: "4 or more"}  # shade of a target's colour → its weight or loss


@dataclass
class Piece:
    """Tokens that are shown together.

    Attributes:
        text: the text, which consists of complete characters; one character may need several tokens.
        kind: "text", "special" (an added token), "visual" (the tokens of a frame) or "gap" (omitted pieces).
        level: key of ``LEVELS`` for a target; 0 if it is not a target.
        title: index, id and loss weight of each token.
    """

    text: str
    kind: str
    level: int = 0
    title: str = ""


@dataclass
class Shot:
    """A picture on the page, as a data URL with a caption and the name of its file."""

    url: str
    caption: str
    file: str


@dataclass
class Card:
    """One sample on the page.

    Attributes:
        name: its file and line.
        details: a line about its tokens.
        shots: its pictures.
        pieces: its text.
        note: what is not shown.
        title: what its answer is, for pairs and labelled answers.
        further: the titles and texts of further answers to the same prompt.
    """

    name: str
    details: str
    shots: list[Shot]
    pieces: list[Piece]
    note: str = ""
    title: str = ""
    further: list[tuple[str, list[Piece]]] = field(default_factory=list)


def make_card(draft: Draft, shots: list[Shot], renderer: Renderer, losses: Sequence[float] = ()) -> Card:
    """The card of a sample whose pictures are `shots`; with the loss of each target, targets are shaded by that."""
    details = f"{draft.num_tokens:,} tokens, {num_targets(draft):,} of them targets"
    left_out = len(draft.media) - MAX_MEDIA
    note = f"{left_out} more pictures and videos are not shown" if left_out > 0 else ""
    further = []
    for answer in draft.followers:
        start = int(np.flatnonzero(answer.weights[1:])[0]) + 1  # the prompt is that of the first answer
        further.append((_title(answer), _shortened(list(pieces(answer, renderer, start)))))
    shown = _shortened(list(pieces(draft, renderer, losses=losses)))
    return Card(draft.source, details, shots, shown, note, _title(draft), further)


def _title(answer: Draft) -> str:
    """What an answer of a pair, or a labelled answer, is; "" for other samples."""
    annotations = answer.annotations
    if annotations.mismatched:
        return "answer of the next sample, for the KL term"
    if annotations.desirable is not None:
        return "desirable" if annotations.desirable else "undesirable"
    return annotations.side or ""


def shots_of(draft: Draft, renderer: Renderer) -> list[Shot]:
    """The pictures of a sample and some frames of its videos. Raises UserError if a file cannot be decoded."""
    patch, shots, numbers = renderer.processor.image_processor.patch_size, [], {Still: 0, Clip: 0}
    for item in draft.media[:MAX_MEDIA]:
        numbers[type(item)] += 1
        number = numbers[type(item)]
        seen = f"seen as {patch * item.grid[2]} × {patch * item.grid[1]}"
        if isinstance(item, Still):
            picture = _image(item.picture.pixels())
            size = f"{picture.width} × {picture.height} px"
            shots.append(Shot(thumbnail(picture), f"image {number}: {size}, {seen}", str(item.picture.file)))
            continue
        count = len(item.frames)
        places = np.linspace(0, count - 1, min(MAX_FRAMES, count)).round().astype(int)
        _, first = np.unique(item.frames.stamps[places], return_index=True)  # a frame may be sampled twice
        frames = item.frames.take(places[first])
        for time, pixels in zip(frames.times, item.video.pixels(frames), strict=True):
            picture = _image(pixels)
            size = f"{picture.width} × {picture.height} px"
            caption = f"video {number} at {time:.1f} s: {size}, {seen}, {count} frames"
            shots.append(Shot(thumbnail(picture), caption, item.video.name))
    return shots


def pieces(draft: Draft, renderer: Renderer, start: int = 0, losses: Sequence[float] = ()) -> Iterator[Piece]:
    """The tokens of a sample in order, grouped such that each group consists of complete characters.

    Args:
        draft: the sample.
        renderer: the renderer of the model's folder.
        start: index of the first token to show; if it is not 0, no picture or video comes after it.
        losses: the loss of each target, by which they are shaded; without it, their weights are.
    """
    tokenizer = renderer.tokenizer
    weights = draft.weights.copy()
    weights[:1] = 0  # the first token is never a target
    shades = weights.copy()
    if len(losses):
        shades[weights > 0] = np.maximum(losses, _LEAST_LOSS)
    what = "loss" if len(losses) else "weight"
    ids, starts = draft.token_ids.tolist(), (np.cumsum(draft.repeats) - draft.repeats).tolist()
    placeholders = {renderer.processor.image_token_id, renderer.processor.video_token_id}
    added, frames, decode = tokenizer.added_tokens_decoder, _frame_texts(draft, renderer), _decoder(tokenizer)

    group: list[int] = []  # indices of tokens that do not form a complete character yet

    def piece(places: list[int], text: str, kind: str) -> Piece:
        told = [f"{what} {shades[p]:.4g}" if shades[p] > 0 else "not a target" for p in places]
        titles = [f"#{starts[p]} · id {ids[p]} · {words}" for p, words in zip(places, told, strict=True)]
        return Piece(text, kind, max(level_of(shades[p]) for p in places), "\n".join(titles))

    for place, token in enumerate(ids[start:], start):
        is_text = token not in placeholders and token not in added
        if group and not is_text:
            yield piece(group, decode([ids[p] for p in group]), "text")
            group = []
        if token in placeholders:
            count = int(draft.repeats[place])
            title = f"#{starts[place]} to #{starts[place] + count - 1} · id {token} · not a target"
            yield Piece(next(frames), "visual", 0, title)
        elif not is_text:
            yield piece([place], decode([token]), "special")
        else:
            group.append(place)
            text = decode([ids[p] for p in group])
            if not text.endswith("\ufffd"):  # the bytes so far end with a complete character
                yield piece(group, text, "text")
                group = []
    if group:
        yield piece(group, decode([ids[p] for p in group]), "text")


def level_of(weight: float) -> int:
    """The shade of a token with this loss weight, or loss; 0 if it is not a target."""
    return min(max(round(3 + math.log2(weight)), 1), 5) if weight > 0 else 0


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """A function that decodes token ids and caches the texts of single tokens."""
    known: dict[int, str] = {}

    def decode(ids: list[int]) -> str:
        if len(ids) > 1:
            return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if ids[0] not in known:
            known[ids[0]] = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return known[ids[0]]

    return decode


def _frame_texts(draft: Draft, renderer: Renderer) -> Iterator[str]:
    """The text shown for the visual tokens of each frame, in text order, with its size in tokens (width × height)."""
    merge, numbers = renderer.vision.merge, {Still: 0, Clip: 0}
    for item in draft.media:
        numbers[type(item)] += 1
        number = numbers[type(item)]
        steps, height, width = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
        size = f"{width} × {height} = {width * height:,} tokens"
        for step in range(steps):
            if isinstance(item, Still):
                yield f"‹image {number}: {size}›"
            else:
                yield f"‹video {number}, frame {step + 1} of {steps}: {size}›"


def _shortened(shown: list[Piece]) -> list[Piece]:
    """The pieces, or the beginning and the end of a sample that is too long for the page."""
    if len(shown) <= MAX_PIECES:
        return shown
    head, tail = MAX_PIECES * 2 // 3, MAX_PIECES // 3
    gap = Piece(f"… {len(shown) - head - tail:,} pieces of text are omitted here …", "gap")
    return [*shown[:head], gap, *shown[-tail:]]


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
