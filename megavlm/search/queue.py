"""The layouts that a search has planned, and those that may still become the fastest."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megavlm.search.candidate import Candidate
from megavlm.search.order import CHUNKS, key_of, least_seconds, smaller
from megavlm.search.work import Form, seconds_of


class Try(NamedTuple):
    """A layout to be planned.

    Attributes:
        least: seconds below which a step cannot come.
        changes: the layout.
        forms: what is tried; see ``savings``.
    """

    least: float
    changes: dict[str, Any]
    forms: Sequence[Form]


class Queue:
    """Tells what to plan next.

    Args:
        valid: all layouts that can be planned.
        forms: see ``savings``.
        limit: bytes that a layout may need.

    Attributes:
        found: of each layout that was planned, the fastest form that fits; otherwise a form that does not.
    """

    def __init__(self, valid: Iterable[dict[str, Any]], forms: Sequence[Form], limit: float):
        self._forms, self._limit = forms, limit
        self._valid = {_key(changes): changes for changes in valid}
        self._interleaved: dict[tuple, list[dict[str, Any]]] = {}
        for changes in self._valid.values():
            if changes[CHUNKS] is not None:
                self._interleaved.setdefault(key_of(changes), []).append(changes)
        self._first: dict[tuple, Candidate] = {}  # plain pipelines with the first form
        self._least_bytes: dict[tuple, float] = {}  # of plain pipelines that fit with the first form alone: of others
        self._waiting: list[Try] = []
        self._later: list[dict[str, Any]] = []  # plain pipelines that are slower than others, but may keep more
        self.found: dict[tuple, Candidate] = {}

    def first_try(self, changes: dict[str, Any], promising: int) -> Try | None:
        """What to plan of a layout without interleaving, after its ``smaller`` ones; None: nothing for the time being.

        It can wait if one of these fits, or if so many (``promising``) layouts are faster than one that does not.
        """
        seconds = sorted(map(seconds_of, self.found.values()))
        slowest = seconds[promising - 1] if len(seconds) >= promising else float("inf")
        known = [self._first[key] for key in smaller(changes) if key in self._first]
        if any(one.ruled_out is None or (one.seconds or 0.0) > slowest for one in known):
            self._later.append(changes)
            return None
        return Try(0.0, changes, self._forms[:1])

    def hopeful(self, most: int) -> list[Try]:
        """The most hopeful layouts, if they may become the fastest; those that wait for ``smaller`` ones come last."""
        fastest = min(map(seconds_of, self.found.values()), default=float("inf"))
        self._waiting = [one for one in self._waiting if one.least < fastest]
        if not self._waiting:
            later = [Try(self._least(changes), changes, self._forms) for changes in self._later]
            self._waiting = [one for one in later if one.least < fastest]
            self._later = []
        self._waiting.sort(key=lambda one: one.least)
        now, self._waiting = self._waiting[:most], self._waiting[most:]
        return now

    def take(self, tries: Sequence[Try], planned: Sequence[Candidate]) -> None:
        """Takes what was planned."""
        for one, candidate in zip(tries, planned, strict=True):
            key = _key(one.changes)
            self.found[key] = min(self.found.get(key, candidate), candidate, key=seconds_of)
            if one.changes[CHUNKS] is not None:
                continue
            plain, is_first = key_of(one.changes), len(one.forms) == 1
            self._first.setdefault(plain, candidate)
            if is_first and candidate.ruled_out is None:
                chunks = self._most_chunks(plain)
                self._waiting.append(Try(least_seconds(candidate, chunks), candidate.changes, self._forms[1:]))
            elif not is_first:
                self._interleave(plain, keeps_more=self._keeps_more(candidate))
                if candidate.ruled_out is not None and candidate.memory is not None:
                    self._least_bytes[plain] = candidate.memory

    def left(self) -> list[dict[str, Any]]:
        """The layouts that were not planned."""
        return [changes for key, changes in self._valid.items() if key not in self.found]

    def _keeps_more(self, candidate: Candidate) -> bool:
        """Whether a layout fits with less computed again than can be."""
        first = self._forms[0]
        return candidate.ruled_out is None and any(candidate.changes[name] != value for name, value in first.items())

    def _interleave(self, plain: tuple, *, keeps_more: bool) -> None:
        """Puts the interleaved forms of a pipeline that fits into the queue. They need more memory."""
        fits = self._first[plain]
        for changes in self._interleaved.get(plain, []) if fits.ruled_out is None else []:
            least = least_seconds(fits, changes[CHUNKS], keeps_more=keeps_more)
            self._waiting.append(Try(least, changes, self._forms if keeps_more else self._forms[:1]))

    def _most_chunks(self, plain: tuple) -> int:
        return max((changes[CHUNKS] for changes in self._interleaved.get(plain, [])), default=1)

    def _least(self, changes: dict[str, Any]) -> float:
        """Seconds below which a layout cannot come by its ``smaller`` ones, which are faster but for their bubble."""
        chunks, least = self._most_chunks(key_of(changes)), 0.0
        for key in (key for key in smaller(changes) if key in self._first):
            one = self._first[key]
            times = _ranks(changes) / _ranks(one.changes)  # no kind of memory is smaller by more
            if (one.memory or 0.0) > self._limit * times and one.ruled_out is not None:
                return float("inf")
            fits = self._least_bytes.get(key, 0.0) <= self._limit * times
            shorter = changes["parallel.context"] // one.changes["parallel.context"]
            least = max(least, least_seconds(one, chunks * shorter, keeps_more=fits))
        return least


def _ranks(changes: dict[str, Any]) -> int:
    return int(changes["parallel.context"] * changes["parallel.expert"])


def _key(changes: dict[str, Any]) -> tuple:
    return *key_of(changes), changes[CHUNKS]
