"""The weight of each token of a sample as a target, and the tokens that pictures and videos occupy."""

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int, float]
"""(first character, character behind the last, weight)"""


def media_tokens(
    token_ids: np.ndarray, starts: np.ndarray, replaced: Sequence[dict], ends: tuple[int, int]
) -> list[tuple[int, int]]:
    """For each picture or video, its first token and the first token behind it, with what was inserted around it.

    Args:
        token_ids: int32 [s].
        starts: int64 [s], the character at which each token starts.
        replaced: the replacements of placeholders (``VisionProcessor.insert_media``).
        ends: token ids of the vision start and end, one of which stands at each side of a placeholder.
    """
    spans = []
    for item in replaced:
        first, behind = np.searchsorted(starts, item["new_span"]).tolist()
        # A tokenizer may have one token for the space before and the "<" with which the time of a frame begins.
        first -= bool(first and (first == len(starts) or starts[first] > item["new_span"][0]))
        first -= bool(first and token_ids[first - 1] == ends[0])
        behind += bool(behind < len(token_ids) and token_ids[behind] == ends[1])
        spans.append((first, behind))
    return spans


def token_weights(
    turns: Sequence[Span] | None,
    replaced: Sequence[dict],
    starts: np.ndarray,
    media: Sequence[tuple[int, int]],
    otherwise: float,
) -> np.ndarray:
    """float32 [s], the weight of each token as a target. Nothing that was inserted for a picture or video is one.

    Args:
        turns: the parts of the text that are targets, sorted, in characters before the replacements; None: all of it.
        replaced: the replacements of placeholders.
        starts: int64 [s], the character at which each token starts, after the replacements.
        media: see ``media_tokens``.
        otherwise: the weight of all tokens if `turns` is None.
    """
    if turns is None:
        weights = np.full(len(starts), otherwise, dtype=np.float32)
    else:
        weights = _weights_of(_shifted(turns, replaced), starts)
    for first, behind in media:
        weights[first:behind] = 0
    return weights


def first_kept(repeats: np.ndarray, media: Sequence[tuple[int, int]], seq_length: int) -> tuple[int, int]:
    """Where to truncate the beginning of a sample so that the rest fits into a row of `seq_length` tokens.

    Args:
        repeats: see ``Draft``.
        media: see ``media_tokens``. Pictures and videos are kept or dropped as a whole.
        seq_length: number of tokens of a row.

    Returns:
        The first token that is kept, and the number of pictures and videos that are dropped.
    """
    lengths = np.cumsum(repeats[::-1])[::-1]  # from each token to the end
    first = int(np.searchsorted(-lengths, -seq_length))
    for dropped, (begin, behind) in enumerate(media):
        if first <= begin:
            return first, dropped
        first = max(first, behind)
    return first, len(media)


def _shifted(spans: Sequence[Span], replaced: Sequence[dict]) -> list[Span]:
    """The positions of spans after the replacements, from the old and new end of each replacement."""
    ends = np.array([0, *(item["span"][1] for item in replaced)])
    moved = np.array([0, *(item["new_span"][1] - item["span"][1] for item in replaced)])

    def move(place: int) -> int:
        return place + int(moved[np.searchsorted(ends, place, side="right") - 1])

    return [(move(start), move(end), weight) for start, end, weight in spans]


def _weights_of(spans: Sequence[Span], starts: np.ndarray) -> np.ndarray:
    """The weight of each token, given the character at which it starts; 0 outside of all spans, which are sorted."""
    bounds = np.array([bound for start, end, _ in spans for bound in (start, end)])
    values = np.array([0.0, *(value for _, _, weight in spans for value in (weight, 0.0))], dtype=np.float32)
    return values[np.searchsorted(bounds, starts, side="right")]
