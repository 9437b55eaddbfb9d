"""How the seconds of a step divide into phases, and the names of the phases for profilers.

On a GPU the time is that of the device: a phase begins and ends where CUDA events stand in its stream, and they are
read later, so that nothing waits for them. A phase therefore has the time in which the device worked on it or waited
for it: "data" has only the wait that the device's own work did not hide. On a CPU it is the time of the process.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist

from megavlm.platform import mark, named_range, reached, seconds_between

PHASES = (
    "data", "sampling", "reference", "tower", "exchange", "decoder", "head", "reduction", "optimizer", "other",
)  # fmt: skip


class Phases:
    """Measures and names the phases of the steps on this rank. An inner phase's time does not count for the outer one.

    Args:
        group: all ranks, in a group for host tensors; None if nothing is measured.
        measured: whether to measure (``log.phases``).

    Attributes:
        is_named: whether phases are ranges of profilers even if nothing is measured.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, measured: bool = False):
        assert group is not None or not measured
        self._group, self._measured, self.is_named = group, measured, False
        self._open: list[str] = []  # the phases that the process is in now, innermost last; [] between steps
        # what goes on from which point on: a phase, or None between steps
        self._marks: list[tuple[str | None, torch.cuda.Event | float]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for one step. Outside of it no phase is measured."""
        self._read()
        with ExitStack() as stack:
            if self._measured or self.is_named:
                stack.enter_context(self._phase("other"))
            yield
        self._open.clear()  # should a hook have left one open
        self._steps += 1

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """A context for a phase of a step, one of ``PHASES``."""
        return self._phase(name) if self._open else nullcontext()

    def named(self, name: str) -> AbstractContextManager[None]:
        """A context for work between steps, which is named for profilers and not measured."""
        return named_range(name) if self._measured or self.is_named else nullcontext()

    def during[T](self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yields the same items; making each of them is a phase."""
        while True:
            with self(name):
                item = next(items, self)
            if item is self:
                return
            yield item  # type: ignore[misc]  # it is not self, so it is one of the items
            del item  # so that its memory is free while the next one is made

    def backward(self, name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """Makes the backward pass from ``outputs`` to ``inputs`` a phase, too. Their gradients stay as they are."""
        if not self._open or not (outputs.requires_grad and inputs.requires_grad):
            return
        with ExitStack() as stack:
            outputs.register_hook(lambda _: stack.enter_context(self(name)))
            inputs.register_hook(lambda _: stack.close())

    def fields(self) -> dict[str, float]:
        """``phase/NAME`` for metrics.jsonl on rank 0, {} elsewhere or if nothing is measured. Call it on all ranks.

        They are seconds per step since the last call, as means over the ranks. What the device has not done yet, most
        often the last update of the weights, counts for the next call.
        """
        if not self._measured or not self._steps:
            return {}
        self._read()
        totals = torch.tensor(list(self._seconds.values()), dtype=torch.float64)
        dist.reduce(totals, 0, group=self._group)
        mean = (totals / (dist.get_world_size(self._group) * self._steps)).tolist()
        self._seconds, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return dict(zip((f"phase/{name}" for name in PHASES), mean, strict=True)) if dist.get_rank() == 0 else {}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._mark()
        try:
            with named_range(name):
                yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        if self._measured:
            self._marks.append((self._open[-1] if self._open else None, mark()))

    def _read(self) -> None:
        """Adds up the phases whose end the device has reached, without waiting for it."""
        done = 0
        for index in range(1, len(self._marks)):
            if not reached(self._marks[index][1]):
                break
            (name, start), (_, end) = self._marks[index - 1], self._marks[index]
            if name is not None:
                self._seconds[name] += seconds_between(start, end)
            done = index
        del self._marks[:done]
