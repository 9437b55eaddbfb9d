"""What a step that computes layers again would keep instead: counted while it computes them again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.tracing.live_memory import LiveMemory


class ComputedAgain:
    """Bytes that are made, and alive at the end, while a module runs that has run before in the same step.

    Args:
        memory: what counts.
        module: a layer of the decoder in a backward pass, or the tower.
        counts: whether the module computes again at the moment.

    Attributes:
        size: without the module's result; the sum of all runs since ``restart``.
    """

    def __init__(self, memory: LiveMemory, module: nn.Module, counts: Callable[[], bool]):
        self._memory, self._counts, self._start, self.size = memory, counts, 0, 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def restart(self) -> None:
        """Counts from zero."""
        self.size = 0

    def _before(self, module: nn.Module, args: Any) -> None:
        self._start = self._memory.live

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counts():
            result = output if isinstance(output, Tensor) else output[0]
            self.size += self._memory.live - self._start - result.untyped_storage().nbytes()


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1
