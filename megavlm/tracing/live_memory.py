"""Counts the bytes of the tensors that are alive while code runs, on the CPU or, without memory, on the meta device."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.monitor.phases import Phases
from megavlm.tracing.operators import tensors_in


class LiveMemory(TorchDispatchMode):
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

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for known in tensors_in((*args, *(kwargs or {}).values())):
            self._note(known, is_new=False)
        results = func(*args, **(kwargs or {}))
        for made in tensors_in((results,)):
            self._note(made, is_new=True)
        return results

    def _note(self, tensor: Tensor, *, is_new: bool) -> None:
        if tensor.device.type != self._where:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if is_new else 0
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, partial(self._freed, key, size, self.phase))
        if size:
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
