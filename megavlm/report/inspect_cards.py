"""A sample as a reader sees it: its pictures, and its text token by token with what is learned of it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megavlm.data.processor import Clip, Still
from megavlm.data.renderer import Draft, Renderer
from megavlm.report.answers import thumbnail

MAX_PIECES = 2400  # shown of one sample: a page must open on a phone
MAX_FRAMES = 4  # shown of one video
MAX_MEDIA = 12  # pictures and videos shown of one sample
LEVELS = {1: "¼ or less", 2: "½", 3: "1", 4: "2", 5: "4 or more"}  # shades of a target's colour, by its weight


@dataclass
class Piece:
    """Tokens that are shown as one.

    Attributes:
        text: what stands there: a whole number of characters, which may be several tokens or none of one.
        kind: "text", "special" (an added token), "visual" (a frame's tokens) or "gap" (left out for length).
        level: key of ``LEVELS`` for a target; 0 where it is none.
        title: index, token id and weight of each.
    """

    text: str
    kind: str
    level: int = 0
    title: str = ""


@dataclass
class Shot:
    """A picture on the page: a data URL, and what it is."""

    url: str
    caption: str
    file: str


@dataclass
class Card:
    """One sample: ``name`` is its file and line, ``details`` a line about it, ``note`` what is not shown."""

    name: str
    details: str
    shots: list[Shot]
    pieces: list[Piece]
    note: str = ""


def make_card(draft: Draft, shots: list[Shot], renderer: Renderer) -> Card:
    """The card of a sample whose pictures are `shots`."""
    targets = int(np.count_nonzero(draft.weights[1:]))
    details = f"{draft.length:,} tokens, {targets:,} of them targets"
    left_out = len(draft.media) - MAX_MEDIA
    note = f"{left_out} more pictures and videos" if left_out > 0 else ""
    return Card(draft.source, details, shots, _shortened(list(pieces(draft, renderer))), note)


def shots_of(draft: Draft, renderer: Renderer) -> list[Shot]:
    """The pictures of a sample, and some frames of its videos. Raises UserError for a file that cannot be decoded."""
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
        sampled = np.asarray(item.metadata.frames_indices)
        places = np.unique(np.linspace(0, len(sampled) - 1, min(MAX_FRAMES, len(sampled))).round().astype(int))
        indices = np.unique(sampled[places])  # a short video may have one frame sampled twice
        for index, pixels in zip(indices.tolist(), item.video.pixels(indices), strict=True):
            picture = _image(pixels)
            size = f"{picture.width} × {picture.height} px"
            caption = f"video {number} at {index / item.metadata.fps:.1f} s: {size}, {seen}, {len(sampled)} frames"
            shots.append(Shot(thumbnail(picture), caption, item.video.name))
    return shots


def pieces(draft: Draft, renderer: Renderer) -> Iterator[Piece]:
    """The tokens of a sample in order, grouped so that each group is whole characters."""
    tokenizer = renderer.tokenizer
    weights = draft.weights.copy()
    weights[:1] = 0  # nothing predicts the first token
    ids, starts = draft.token_ids.tolist(), (np.cumsum(draft.repeats) - draft.repeats).tolist()
    placeholders = {renderer.processor.image_token_id, renderer.processor.video_token_id}
    added, frames, decode = tokenizer.added_tokens_decoder, _frame_texts(draft, renderer), _decoder(tokenizer)

    group: list[int] = []  # places of tokens that are no whole character yet

    def piece(places: list[int], text: str, kind: str) -> Piece:
        titles = [f"#{starts[p]} · id {ids[p]} · {_weight_text(weights[p])}" for p in places]
        return Piece(text, kind, max(level_of(weights[p]) for p in places), "\n".join(titles))

    for place, token in enumerate(ids):
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
            if not text.endswith("\ufffd"):  # the bytes so far end with a character
                yield piece(group, text, "text")
                group = []
    if group:
        yield piece(group, decode([ids[p] for p in group]), "text")


def level_of(weight: float) -> int:
    """The shade of a token with this weight in the loss; 0 where it is no target."""
    return min(max(round(3 + math.log2(weight)), 1), 5) if weight > 0 else 0


def _weight_text(weight: float) -> str:
    return f"weight {weight:g}" if weight > 0 else "not a target"


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Decodes token ids, remembering what single ones are."""
    known: dict[int, str] = {}

    def decode(ids: list[int]) -> str:
        if len(ids) > 1:
            return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if ids[0] not in known:
            known[ids[0]] = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return known[ids[0]]

    return decode


def _frame_texts(draft: Draft, renderer: Renderer) -> Iterator[str]:
    """What stands for the visual tokens of each frame, in text order; sizes in tokens, width × height."""
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
    """The beginning and the end of a sample that is too long for a page."""
    if len(shown) <= MAX_PIECES:
        return shown
    head, tail = MAX_PIECES * 2 // 3, MAX_PIECES // 3
    gap = Piece(f"… {len(shown) - head - tail:,} pieces of text left out here …", "gap")
    return [*shown[:head], gap, *shown[-tail:]]


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
