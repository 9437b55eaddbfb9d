"""What texts and pictures are compared by: a hash for equality, and numbers that are alike where they are alike."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from megavlm.media.files import File
from megavlm.records.questions import plain_text

NUM_HASHES = 16
_WORD = re.compile(r"\w+")
_SHINGLE = 3  # words that stand side by side
_FIELDS = ("messages", "text", "prompt", "problem", "chosen", "rejected", "completion", "answer", "solution")
_RANDOM = np.random.default_rng(0)
_FACTORS = _RANDOM.integers(0, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)
_PLACES = _RANDOM.integers(0, 2**63, _SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def words_of(record: Any) -> list[str]:
    """The words of a record in lower case, without marks and punctuation, whoever says them."""
    found = _texts(record) if isinstance(record, dict) else ()
    return _WORD.findall(" ".join(found).lower())


def _texts(record: dict) -> Iterator[str]:
    for name in _FIELDS:
        said = record.get(name)
        if name in ("answer", "solution") and "messages" in record:
            continue
        for message in said if isinstance(said, list) and name != "text" else [said]:
            yield plain_text(message.get("content") if isinstance(message, dict) else message)


def equality(data: bytes) -> int:
    """64 bits that are the same for the same bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def min_hashes(words: list[str]) -> np.ndarray:
    """uint32 [NUM_HASHES]: two texts agree in about as many as they share of their groups of three words."""
    ids = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    if len(ids) < _SHINGLE:
        ids = np.pad(ids, (0, _SHINGLE - len(ids)))
    groups = np.lib.stride_tricks.sliding_window_view(ids, _SHINGLE)
    mixed = (groups * _PLACES).sum(axis=1, dtype=np.uint64)
    hashed = (mixed[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)
    return hashed.min(axis=0).astype(np.uint32)


def look_of(file: File) -> int | None:
    """64 bits of a picture: where it becomes brighter from left to right, in 8 × 8 places of its gray values.

    They hardly change with size, quality and colours. None for a picture that is not read, or nearly of one colour.
    """
    try:
        with file.open() as stream, Image.open(stream) as image:
            if image.format == "EPS":
                return None
            image.draft("L", (64, 64))  # JPEG is decoded at a smaller size
            gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    except Exception:  # a video, or a broken picture, which the inspection of samples names
        return None
    bits = (gray[:, 1:] > gray[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes()) if 6 <= bits.sum() <= 58 else None
