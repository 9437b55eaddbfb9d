"""The layouts that a search has planned, and those that may still become the fastest."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from megavlm.search.candidate import Candidate
from megavlm.search.order import CHUNKS, halves, key_of, least_seconds, smaller
from megavlm.search.work import Form, need_of, seconds_of

_SAVES = 0.01
"""Share of the memory that a form must save to be tried beside one that keeps more."""
_ESTIMATE = 0.03
"""Share by which what a layout would need with less computed again is estimated too high, at most."""


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


class _Like(NamedTuple):
    """A layout that was planned, and by how many seconds another that is like it may be faster."""

    planned: Candidate
    faster: float = 0.0


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
        self._first_form, *self._others = forms
        self._others.reverse()  # what keeps most comes first
        self._limit = limit
        self._valid = {_key(changes): changes for changes in valid}
        self._interleaved: dict[tuple, list[dict[str, Any]]] = {}
        for changes in self._valid.values():
            if changes[CHUNKS] is not None:
                self._interleaved.setdefault(key_of(changes), []).append(changes)
        self._first: dict[tuple, Candidate] = {}  # of plain pipelines, the first form
        self._showed: dict[tuple, list[_Like]] = {}  # of plain pipelines that waited
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
        like = self._like(changes)
        if any(one.ruled_out is None or (one.seconds or 0.0) - faster > slowest for one, faster in like):
            self._later.append(changes)
            self._showed[key_of(changes)] = like
            return None
        return Try(0.0, changes, [self._first_form])

    def hopeful(self, most: int) -> list[Try]:
        """The most hopeful layouts, if they may become the fastest. None is before those that tell of it."""
        fastest = min(map(seconds_of, self.found.values()), default=float("inf"))
        self._waiting = [one for one in self._waiting if one.least < fastest]
        while ready := self._ready():
            tries = [self._late_try(changes) for changes in ready]
            self._waiting += [one for one in tries if one.least < fastest]
        self._waiting.sort(key=lambda one: one.least)
        now, self._waiting = self._waiting[:most], self._waiting[most:]
        return now

    def _ready(self) -> list[dict[str, Any]]:
        """Takes those of the later layouts out of which those that tell of them are planned, or need not be."""
        waiting = [one.changes for one in self._waiting if one.changes[CHUNKS] is None]
        keys = set(map(key_of, [*self._later, *waiting]))
        ready = [c for c in self._later if not keys.intersection([*smaller(c), *halves(c)])]
        self._later = [changes for changes in self._later if changes not in ready]
        return ready

    def take(self, tries: Sequence[Try], planned: Sequence[Candidate]) -> None:
        """Takes what was planned."""
        for one, candidate in zip(tries, planned, strict=True):
            key = _key(one.changes)
            self.found[key] = min(self.found.get(key, candidate), candidate, key=seconds_of)
            if one.changes[CHUNKS] is not None:
                continue
            plain, forms = key_of(one.changes), list[Form]()
            if one.forms == [self._first_form]:
                self._first[plain] = candidate
                forms = self._that_may_fit(candidate.changes, self._others) if candidate.ruled_out is None else []
            if forms:
                least = least_seconds(candidate, self._most_chunks(plain), **_saved(forms, self._first_form))
                self._waiting.append(Try(least, candidate.changes, forms))
            else:
                self._interleave(self.found[key])

    def left(self) -> list[dict[str, Any]]:
        """The layouts that were not planned."""
        return [changes for key, changes in self._valid.items() if key not in self.found]

    def _interleave(self, plain: Candidate) -> None:
        """Puts the interleaved forms of a pipeline into the queue, if it fits. They need more memory.

        So they fit with no more than it keeps: a form that keeps more does not fit there.
        """
        if plain.ruled_out is not None:
            return
        forms = [*self._others, self._first_form]
        forms = forms[next((place for place, form in enumerate(forms) if _has(plain, form)), 0) :]
        for changes in self._interleaved.get(key_of(plain.changes), []):
            may_fit = self._that_may_fit(changes, forms)
            if may_fit:
                least = least_seconds(plain, changes[CHUNKS], decoder=False)
                if may_fit == [self._first_form] and plain.parts and not _has(plain, self._first_form):
                    least += plain.parts["forward"]  # which is computed again
                self._waiting.append(Try(least, changes, may_fit))

    def _that_may_fit(self, changes: Mapping[str, Any], forms: Sequence[Form]) -> list[Form]:
        """The forms of a layout that may fit, told by the plain pipeline, otherwise by some with less parallelism."""
        own = self._first.get(key_of(changes))
        less = [self._first[key] for key in (*smaller(changes), *halves(changes)) if key in self._first]
        tell, found, least = [own] if own is not None else less, list[Form](), float("inf")
        for form in forms:
            need = need_of(form, changes[CHUNKS] or 1)
            told = [_scaled(one.needs[need], one, changes) for one in tell if need in one.needs]
            if any(needed > self._limit * (1 + _ESTIMATE) or needed > least * (1 - _SAVES) for needed in told):
                continue
            found.append(form)
            least = max(told, default=least)
        return found

    def _most_chunks(self, plain: tuple) -> int:
        return max((changes[CHUNKS] for changes in self._interleaved.get(plain, [])), default=1)

    def _like(self, changes: Mapping[str, Any]) -> list[_Like]:
        """Layouts like this one that are faster if they fit.

        More context parallelism is slower but for the bubble. A doubling of expert parallelism saves no more than the
        one before it. In the place of layouts that need not be planned are those that showed it.
        """
        found: list[_Like] = []
        for key in smaller(changes):
            found += [_Like(self.found[*key, None])] if (*key, None) in self.found else self._showed.get(key, [])
        keys = [*halves(changes), None, None][:2]
        half, quarter = (self.found.get((*key, None)) if key else None for key in keys)
        if half and half.seconds and quarter and quarter.seconds:
            found.append(_Like(half, max(quarter.seconds - half.seconds, 0.0)))
        elif half is None and keys[0] is not None:
            found += [_Like(one.planned, 2 * one.faster) for one in self._showed.get(keys[0], [])]
        return found

    def _late_try(self, changes: dict[str, Any]) -> Try:
        """What to plan of a layout that waited for those that are like it."""
        chunks, least, context = self._most_chunks(key_of(changes)), 0.0, changes["parallel.context"]
        forms = self._that_may_fit(changes, self._others)
        self._showed[key_of(changes)] = self._like(changes)
        for planned, faster in self._showed[key_of(changes)]:
            if planned.ruled_out is not None and not self._may_fit(changes, planned):
                least = float("inf")
            saved = _saved(forms, {name: planned.changes[name] for name in self._first_form})
            shorter = max(context // planned.changes["parallel.context"], 1)  # the bubble, with more micro-batches
            least = max(least, least_seconds(planned, chunks * shorter, **saved) - faster)
        return Try(least, changes, [*forms, self._first_form])

    def _may_fit(self, changes: Mapping[str, Any], other: Candidate) -> bool:
        """Whether a layout may fit where another with less context or expert parallelism does not."""
        return other.memory is None or _scaled(other.memory, other, changes) <= self._limit


def _scaled(memory: int, of: Candidate, changes: Mapping[str, Any]) -> float:
    """The memory of a layout, told by that of another with less context or expert parallelism.

    Context parallelism divides what is alive for a while, and expert parallelism what a rank holds all the time.
    """
    context, expert = (changes[name] / of.changes[name] for name in ("parallel.context", "parallel.expert"))
    held = of.static or 0
    return (memory - held) / context + held / expert


def _saved(forms: Sequence[Form], planned: Form) -> dict[str, bool]:
    """Whether some of the forms compute less again, in the decoder and in the tower, than what was planned."""
    decoder, tower = "train.recompute", "vision.recompute"
    return {
        "decoder": planned[decoder] != "none" and any(form[decoder] != "full" for form in forms),
        "tower": planned[tower] and not all(form[tower] for form in forms),
    }


def _has(candidate: Candidate, form: Form) -> bool:
    return all(candidate.changes[name] == value for name, value in form.items())


def _key(changes: dict[str, Any]) -> tuple:
    return *key_of(changes), changes[CHUNKS]
