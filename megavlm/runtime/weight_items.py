"""What becomes of the pieces of a weight that ranks hold: tensors under Hugging Face's or peft's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.adapter import merged_weight
from megavlm.convert.names import Entry
from megavlm.convert.peft_names import CHECKPOINT_PREFIX, Linear, tensor_shapes, to_peft
from megavlm.convert.safetensors_file import TensorInfo
from megavlm.convert.tensor_order import Shape
from megavlm.platform import device

type Named = list[tuple[str, Tensor]]
"""Tensors with the names under which they are sent."""


class Item(Protocol):
    """Tensors that are put together and sent at the same time.

    Attributes:
        keys: the tensors of a checkpoint that it is made of.
        nbytes: the bytes of what is sent.
    """

    @property
    def keys(self) -> list[str]: ...
    @property
    def nbytes(self) -> int: ...

    def begin(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, list[Tensor]]:
        """Allocates the tensors. Returns by key the blocks to fill, which make up the checkpoint's tensor (Layout)."""

    def end(self) -> Named:
        """Returns the tensors, whose blocks have been filled, and forgets them."""


@dataclass
class AdapterItem:
    """One tensor of an adapter under peft's ``name``."""

    name: str
    linear: Linear
    kind: str
    shape: Shape
    dtype: torch.dtype
    _whole: list[Tensor] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [adapter_key(self.linear, self.kind)]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def begin(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, list[Tensor]]:
        self._whole = [torch.empty(self.shape, dtype=dtypes[self.keys[0]], device=device())]
        return {self.keys[0]: self._whole}

    def end(self) -> Named:
        return [(self.name, to_peft(self.linear, self.kind, self._whole.pop()))]


@dataclass
class WeightItem:
    """The tensors of one entry of the table of names, such as q, k and v of a layer, or its experts.

    Attributes:
        entry: the entry.
        stored: by name, shape and dtype of these tensors and of their copies in the Hugging Face folder.
        adapter: the settings of the adapters in ``linears``.
        linears: by name, the linear layers of the entry into which an adapter is to be merged.
    """

    entry: Entry
    stored: Mapping[str, TensorInfo]
    adapter: AdapterSettings | None = None
    linears: Mapping[str, Linear] = field(default_factory=dict)
    _parts: list[Tensor] = field(default_factory=list)
    _adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names under which tensors are sent."""
        return [*self.entry.hf, *(name for name in self.entry.copies if name in self.stored)]

    @property
    def keys(self) -> list[str]:
        linears = self.linears.values()
        return [self.entry.key, *(adapter_key(x, kind) for x in linears for kind in self._shapes_of_adapter(x))]

    @property
    def nbytes(self) -> int:
        return sum(self.stored[name].nbytes for name in self.names)

    def begin(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, list[Tensor]]:
        new = lambda shape, key: torch.empty(shape, dtype=dtypes[key], device=device())
        self._parts = [new(self.stored[name].shape, self.entry.key) for name in self.entry.hf]
        blocks = {self.entry.key: self.entry.layout.blocks(self._parts, self.entry.shape)}
        for name, linear in self.linears.items():
            shapes = self._shapes_of_adapter(linear)
            self._adapters[name] = {kind: new(shape, adapter_key(linear, kind)) for kind, shape in shapes.items()}
            blocks |= {adapter_key(linear, kind): [tensor] for kind, tensor in self._adapters[name].items()}
        return blocks

    def end(self) -> Named:
        ended: Named = []
        for name in self.entry.hf:
            tensor = self._merged(name.removesuffix(".weight"), self._parts.pop(0))
            # first into the dtype of the run, then into that of the folder, as in an export
            ended.append((name, tensor.to(self.stored[name].torch_dtype)))
        copies = self.names[len(self.entry.hf) :]  # only an entry with a single name has copies
        return ended + [(copy, ended[0][1].to(self.stored[copy].torch_dtype)) for copy in copies]

    def _shapes_of_adapter(self, linear: Linear) -> dict[str, Shape]:
        assert self.adapter is not None
        return tensor_shapes(self.adapter, linear)

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight with its adapter, if it has one; in the weight's memory if it is one of experts."""
        tensors, linear = self._adapters.pop(name, None), self.linears.get(name)
        if tensors is None or linear is None or self.adapter is None:
            return weight
        if not linear.experts:
            return merged_weight(self.adapter, linear, weight, tensors)
        for number, expert in enumerate(weight):
            own = {kind: tensor[number] for kind, tensor in tensors.items()}
            expert.copy_(merged_weight(self.adapter, linear, expert, own))
        return weight


def adapter_key(linear: Linear, kind: str) -> str:
    """The key of a tensor of an adapter in a checkpoint."""
    return f"{CHECKPOINT_PREFIX}{linear.name}.{kind}"
