"""Copies that are made when they are waited for and not a moment earlier, so that whoever does not wait fails."""

import weakref

import torch
from torch import Tensor


class LateStream:
    """Stands for ``SideStream``. What is freed before it was copied, and what is read before it has come, is NaN."""

    def __init__(self) -> None:
        self.copies = self.waits = 0
        self._done, self._queue = 0, []

    def copy(self, target: Tensor, source: Tensor) -> int:
        target.fill_(float("nan")) if target.is_floating_point() else None
        self._queue.append((weakref.ref(target), weakref.ref(source)))
        self.copies += 1
        return self.copies

    def wait(self, copied: int) -> None:
        self.waits += 1
        for _ in range(copied - self._done):
            target, source = (one() for one in self._queue.pop(0))
            if target is not None:
                target.copy_(torch.full_like(target, float("nan")) if source is None else source)
            self._done += 1
