"""Counts the bytes of the tensors that are alive while code runs, on the CPU or, without memory, on the meta device."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from megavlm.monitor.phases import Phases
from megavlm.tracing.dispatch import Dispatch
from megavlm.tracing.operators import tensors_in


class LiveMemory(Dispatch):
    """Within the block, follows each storage that an operation of torch makes, from then until it is freed.

    A storage belongs to the phase in which it was made. Storages that exist before the block are not counted, nor are
    memory that kernels use for themselves, and arrays of numpy. The operations of a backward pass are seen, too.

    Attributes:
        live, peak: bytes of the storages that are alive now, and the largest value since ``watch``.
        by_phase, at_peak: the bytes of each phase now, and at that moment.
        peak_phase: the phase in which it was.
    """

    phase = "other"

    def __init__(self, where: torch.device):
        super().__init__()
        self._where = where.type
        self._alive: dict[int, weakref.ref] = {}  # by the address of the storage
        self.by_phase: Counter[str] = Counter()
        self.live = 0
        self.watch()

    def watch(self) -> None:
        """Looks for the peak from now on."""
        self.peak, self.at_peak, self.peak_phase = self.live, dict(self.by_phase), self.phase

    def add(self, sizes: Mapping[str, int], times: int = 1) -> None:
        """Counts so many times these ``sizes`` by phase as alive, without tensors; less than 0 takes them back."""
        for phase, size in sizes.items():
            self._add(times * size, phase)

    def see(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if func.is_view:
            return
        given: set[int] | None = None
        for made in (result,) if isinstance(result, Tensor) else tensors_in((result,)):
            if made.device.type != self._where:
                continue
            storage = made.untyped_storage()
            key = storage._cdata
            if key in self._alive:
                continue
            if given is None:
                given = {one.untyped_storage()._cdata for one in tensors_in((*args, *kwargs.values()))}
            if key not in given:  # it was not there before
                self._note(storage, key)

    def _note(self, storage: UntypedStorage, key: int) -> None:
        if size := storage.nbytes():
            self._alive[key] = weakref.ref(storage, partial(self._freed, key, size, self.phase))
            self._add(size, self.phase)

    def _add(self, size: int, phase: str) -> None:
        self.live += size
        self.by_phase[phase] += size
        if self.live > self.peak:
            self.watch()

    def _freed(self, key: int, size: int, phase: str, _: weakref.ref) -> None:
        del self._alive[key]
        self._add(-size, phase)


class Counting(Protocol):
    """What counts by phases: a ``LiveMemory``, or ``Operators``."""

    phase: str


class PhasesOf(Phases):
    """Tells what counts in which phase of a step it is."""

    def __init__(self, counting: Counting):
        super().__init__()
        self._counting, self.is_named = counting, True

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before, self._counting.phase = self._counting.phase, name
        try:
            with super()._phase(name):
                yield
        finally:
            self._counting.phase = before
