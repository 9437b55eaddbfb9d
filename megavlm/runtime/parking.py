"""Models that are not used for a while wait in host memory, and their device memory is free meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megavlm.model.vlm import PARTS, VLM
from megavlm.platform import host_buffer


class Parking:
    """Keeps tensors in host memory, except within ``with parking():``.

    Whole storages move, so that all views stay what they are: of gradient buffers, and of parameters that two modules
    share. Their memory on the device is given back to torch's allocator.

    Args:
        kept: returns the tensors whose values are kept, anew before each move, as an optimizer may make its state late.
        scratch: returns tensors that need no values, such as gradients between two updates.
        constant: whether the values never change, so that they are copied to the host once.
    """

    def __init__(
        self,
        kept: Callable[[], Iterable[Tensor]],
        scratch: Callable[[], Iterable[Tensor]] = lambda: (),
        *,
        constant: bool = False,
    ):
        self._kept, self._scratch, self._is_constant = kept, scratch, constant
        self._copies: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # by the address of torch's own object
        self._empty: list[tuple[torch.UntypedStorage, int]] = []
        self._users = 0
        self._park()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the block the tensors are on the device. Blocks may be nested."""
        if not self._users:
            self._wake()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._park()

    def _park(self) -> None:
        before, self._copies = self._copies, {}
        for storage in _storages(self._kept()):
            _, copy = before.get(storage._cdata, (storage, None))
            if copy is None or not self._is_constant:
                if copy is None:
                    copy = host_buffer(1, storage.nbytes(), torch.uint8).flatten()
                copy.copy_(_bytes(storage), non_blocking=True)
            self._copies[storage._cdata] = storage, copy
            storage.resize_(0)
        for storage in _storages(self._scratch()):
            self._empty.append((storage, storage.nbytes()))
            storage.resize_(0)

    def _wake(self) -> None:
        for storage, copy in self._copies.values():
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)
        for storage, size in self._empty:
            storage.resize_(size)
            _bytes(storage).zero_()
        self._empty = []


def parked_model(vlm: VLM, others: Iterable[VLM]) -> Parking:
    """Parks the weights of a frozen model, but those that it shares with ``others``."""
    own = own_weights(vlm, others)
    return Parking(lambda: own, constant=True)


def own_weights(vlm: VLM, others: Iterable[VLM]) -> list[Tensor]:
    """The parameters and buffers of a model, but those that it shares with ``others``."""
    shared = {storage.data_ptr() for other in others for storage in _storages(_weights(other))}
    return [weight for weight in _weights(vlm) if weight.untyped_storage().data_ptr() not in shared]


def _weights(vlm: VLM) -> list[Tensor]:
    modules = [module for part in PARTS for module in vlm.modules_of(part)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors, each once, without empty ones."""
    found = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return iter([storage for storage in found.values() if storage.nbytes()])


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
