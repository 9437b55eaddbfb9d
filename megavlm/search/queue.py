"""The layouts that a search has planned, and those that may still become the fastest."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megavlm.search.candidate import Candidate
from megavlm.search.order import CHUNKS, halves, key_of, least_seconds, smaller
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
        self._many = [*forms[1:], forms[0]]  # in the order in which fewest are planned
        self._valid = {_key(changes): changes for changes in valid}
        self._interleaved: dict[tuple, list[dict[str, Any]]] = {}
        for changes in self._valid.values():
            if changes[CHUNKS] is not None:
                self._interleaved.setdefault(key_of(changes), []).append(changes)
        self._too_large: dict[tuple, Candidate] = {}  # plain pipelines of which only the first form fits: another
        self._waiting: list[Try] = []
        self._later: list[dict[str, Any]] = []  # plain pipelines that are slower than others, but may keep more
        self.found: dict[tuple, Candidate] = {}

    def first_try(self, changes: dict[str, Any], promising: int) -> Try | None:
        """What to plan of a layout without interleaving; None: nothing for the time being.

        It can wait if others are faster that are like it, or if so many (``promising``) are faster than one that is
        faster than it but does not fit.
        """
        seconds = sorted(map(seconds_of, self.found.values()))
        slowest = seconds[promising - 1] if len(seconds) >= promising else float("inf")
        faster = [one for one, _ in self._faster(changes)]
        if any(one.ruled_out is None or (one.seconds or 0.0) > slowest for one in faster):
            self._later.append(changes)
            return None
        return Try(0.0, changes, self._forms[:1])

    def hopeful(self, most: int) -> list[Try]:
        """The most hopeful layouts, if they may become the fastest; those that wait for others come last."""
        fastest = min(map(seconds_of, self.found.values()), default=float("inf"))
        self._waiting = [one for one in self._waiting if one.least < fastest]
        while not self._waiting and self._later:
            self._waiting = [one for one in self._next() if one.least < fastest]
        self._waiting.sort(key=lambda one: one.least)
        now, self._waiting = self._waiting[:most], self._waiting[most:]
        return now

    def _next(self) -> list[Try]:
        """Those of the layouts that wait for none that waits."""
        keys = set(map(key_of, self._later))
        now = [c for c in self._later if not keys.intersection([*smaller(c), *halves(c)])]
        self._later = [changes for changes in self._later if changes not in now]
        return [Try(self._least(changes), changes, self._many) for changes in now]

    def take(self, tries: Sequence[Try], planned: Sequence[Candidate]) -> None:
        """Takes what was planned."""
        for one, candidate in zip(tries, planned, strict=True):
            key = _key(one.changes)
            self.found[key] = min(self.found.get(key, candidate), candidate, key=seconds_of)
            if one.changes[CHUNKS] is not None:
                continue
            plain, is_first = key_of(one.changes), len(one.forms) == 1
            if is_first and candidate.ruled_out is None:
                chunks = self._most_chunks(plain)
                self._waiting.append(Try(least_seconds(candidate, chunks), candidate.changes, self._forms[1:]))
            elif not is_first:
                if candidate.ruled_out is not None:
                    self._too_large[plain] = candidate
                self._interleave(self.found[key])

    def left(self) -> list[dict[str, Any]]:
        """The layouts that were not planned."""
        return [changes for key, changes in self._valid.items() if key not in self.found]

    def _interleave(self, plain: Candidate) -> None:
        """Puts the interleaved forms of a pipeline into the queue, if it fits. They need more memory."""
        if plain.ruled_out is not None:
            return
        keeps_more = not self._has(plain, self._forms[0])
        for changes in self._interleaved.get(key_of(plain.changes), []):
            least = least_seconds(
                plain, changes[CHUNKS], keeps_more=keeps_more and not self._has(plain, self._forms[-1])
            )
            self._waiting.append(Try(least, changes, self._many if keeps_more else self._forms[:1]))

    @staticmethod
    def _has(candidate: Candidate, form: Form) -> bool:
        return all(candidate.changes[name] == value for name, value in form.items())

    def _most_chunks(self, plain: tuple) -> int:
        return max((changes[CHUNKS] for changes in self._interleaved.get(plain, [])), default=1)

    def _faster(self, changes: dict[str, Any]) -> list[tuple[Candidate, int]]:
        """Layouts like this one that are faster if they fit, and by how much its bubble may be smaller than theirs."""
        context = changes["parallel.context"]
        less = [self.found[*key, None] for key in smaller(changes) if (*key, None) in self.found]
        found = [(one, context // one.changes["parallel.context"]) for one in less]
        half, quarter = ([*(self.found.get((*key, None)) for key in halves(changes)), None, None])[:2]
        if half and quarter and (half.seconds or 0.0) > (quarter.seconds or float("inf")):
            found.append((half, 1))
        return found

    def _least(self, changes: dict[str, Any]) -> float:
        """Seconds below which a layout cannot come by those that are like it."""
        chunks, least = self._most_chunks(key_of(changes)), 0.0
        for one, shorter in self._faster(changes):
            if one.ruled_out is not None and not self._may_fit(changes, one):
                return float("inf")
            too_large, keeps_all = self._too_large.get(key_of(one.changes)), self._has(one, self._forms[-1])
            keeps_more = not keeps_all and (too_large is None or self._may_fit(changes, too_large))
            least = max(least, least_seconds(one, chunks * shorter, keeps_more=keeps_more))
        return least

    def _may_fit(self, changes: dict[str, Any], other: Candidate) -> bool:
        """Whether a layout may fit where one with less context or expert parallelism does not.

        Context parallelism divides what is alive for a while, and expert parallelism what a rank holds all the time.
        """
        if other.memory is None or other.static is None:
            return True
        context, expert = (changes[name] / other.changes[name] for name in ("parallel.context", "parallel.expert"))
        return (other.memory - other.static) / context + other.static / expert <= self._limit


def _key(changes: dict[str, Any]) -> tuple:
    return *key_of(changes), changes[CHUNKS]
