"""Which samples have changed since their reference log-probabilities were computed: a digest of each record."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from megavlm.base.heartbeat import beat
from megavlm.sources.blend import Source

_BEAT_EVERY = 1000  # records
_UNREADABLE = 0  # the digest of a record that cannot be read


def record_digests(sources: Sequence[Source]) -> list[np.ndarray]:
    """The digest of each record of each source: int64 [samples]. Reads all records, but none of their media."""
    found = []
    for source in sources:
        digests = np.zeros(len(source.file), dtype=np.int64)
        for index in range(len(digests)):
            if index % _BEAT_EVERY == 0:
                beat("the digests of records")
            digests[index] = _digest(source, index)
        found.append(digests)
    return found


def kept_rows(
    tables: Sequence[np.ndarray], before: Sequence[np.ndarray], now: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The tables for the records as they are now: NaN for those that are new or have changed.

    Args:
        tables: float32 [samples before, columns] of each source.
        before: the digests of the records when the tables were made.
        now: those of the same sources now.
    """
    found = []
    for table, old, new in zip(tables, before, now, strict=True):
        rows = np.full((len(new), table.shape[1]), np.nan, dtype=np.float32)
        common = min(len(old), len(new))
        same = np.flatnonzero((old[:common] == new[:common]) & (new[:common] != _UNREADABLE))
        rows[same] = table[same]
        found.append(rows)
    return found


def _digest(source: Source, index: int) -> int:
    try:
        record = json.dumps(source.file.read(index)[0], sort_keys=True, ensure_ascii=True)
    except Exception:  # training reports broken samples
        return _UNREADABLE
    return int.from_bytes(hashlib.blake2b(record.encode(), digest_size=8).digest(), "big", signed=True)
