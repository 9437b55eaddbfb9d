"""Host memory for tensors that autograd saves in a forward pass and needs again in the backward pass."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from megavlm.platform.device import on_gpu
from megavlm.platform.host_memory import HostMemory


class SideStream:
    """Copies beside the work of a GPU, one after the other in the order in which they are asked for.

    A copy begins when the GPU has done what it was told before. On a CPU it is done at once.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if on_gpu() else None

    def copy(self, target: Tensor, source: Tensor) -> "torch.cuda.Event | None":
        """Copies ``source`` and returns what ``wait`` takes."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            target.copy_(source, non_blocking=True)
        return None if self._stream is None else self._stream.record_event()

    def wait(self, copied: "torch.cuda.Event | None") -> None:
        """Lets the GPU wait for a copy before what it is told next. The host does not wait."""
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)


class HostStates:
    """Keeps the inputs of recomputed layers in host memory between the two passes (as vDNN does, arXiv 1602.08124).

    The input of a layer goes to the host while the next layer computes. It comes back while the layer behind it
    computes its gradients. The device has two of them more than the one in use. All copies are in one stream, so host
    memory can be written to again without waiting for what was read from it. If a backward pass ends in an exception,
    a copy to the device may still be under way to memory that is free by then, so the process must end, too.

    Args:
        stream: makes the copies; None: a new one.
    """

    def __init__(self, stream: SideStream | None = None):
        self._stream = stream or SideStream()
        self._free: list[tuple[HostMemory, Tensor]] = []  # pieces of memory, each as bytes [n]
        self._largest = 0
        self._last: Callable[[], _State | None] = lambda: None

    @contextmanager
    def of(self, shape: torch.Size, layers: int, *, received: bool = False) -> Iterator[None]:
        """Within the block, the first ``layers`` tensors of this shape that autograd saves are in host memory.

        A model's final norm saves one more, which is needed first in the backward pass, and stays. So does the first
        tensor if it was ``received`` from another pipeline stage, because the schedule keeps it, too.
        """
        before: _State | None = None
        number = 0

        def save(tensor: Tensor) -> "Tensor | _State":
            nonlocal before, number
            if tensor.shape != shape:
                return tensor
            number += 1
            if not received < number <= layers:
                return tensor
            before = _State(tensor, before, self._stream, self._piece(tensor))
            if (last := self._last()) is not None:
                last.let_go()
            self._last = weakref.ref(before)
            return before

        with torch.autograd.graph.saved_tensors_hooks(save, lambda it: it if isinstance(it, Tensor) else it.take()):
            yield

    def _piece(self, tensor: Tensor) -> "_Piece":
        """Host memory for a tensor. It has the size of the largest one so far, so that any of them can use it again."""
        if tensor.is_meta:  # the memory of a plan
            return _Piece(None, tensor)
        self._largest = max(self._largest, tensor.nbytes)
        index = next((i for i, (_, room) in enumerate(self._free) if len(room) >= tensor.nbytes), None)
        if index is None:
            block = HostMemory([self._largest])
            owned = block, block.take(self._largest, torch.uint8)
        else:
            owned = self._free.pop(index)
        piece = _Piece(owned[1], tensor)
        weakref.finalize(piece, self._free.append, owned).atexit = False
        return piece


class _Piece:
    """A piece of host memory that has the values of a tensor; None if the tensor has none."""

    def __init__(self, room: Tensor | None, like: Tensor):
        self.values = None if room is None else room[: like.nbytes].view(like.dtype).view(like.shape)


class _State:
    """A tensor in host memory, and on the device while it is copied or used.

    Args:
        tensor: the tensor on the device.
        before: the one that was saved before it, which the backward pass needs after it.
        stream: makes the copies.
        piece: the host memory.
    """

    def __init__(self, tensor: Tensor, before: "_State | None", stream: SideStream, piece: _Piece):
        self._like = tensor.shape, tensor.dtype, tensor.device
        self._before, self._stream, self._piece = before, stream, piece
        self._tensor: Tensor | None = tensor
        self._copied = None if piece.values is None else stream.copy(piece.values, tensor)

    def let_go(self) -> None:
        """Frees the device's memory, once the copy is done."""
        if self._tensor is not None:
            self._stream.wait(self._copied)
            self._tensor = None

    def fetch(self) -> None:
        """Begins to copy it to the device, unless it is there."""
        if self._tensor is None:
            shape, dtype, where = self._like
            self._tensor = torch.empty(shape, dtype=dtype, device=where)
            if self._piece.values is not None:
                self._copied = self._stream.copy(self._tensor, self._piece.values)

    def take(self) -> Tensor:
        """The tensor on the device, for the backward pass, which takes the one before it next."""
        self.fetch()
        if self._before is not None:
            self._before.fetch()
        self._stream.wait(self._copied)
        tensor, self._tensor, self._before = self._tensor, None, None
        assert tensor is not None
        return tensor
