"""The order of the values of a weight in Hugging Face's and in Megatron's form, and the conversions between them.

A layout converts the HF tensors of a table entry into the Megatron tensor (``to_mcore``) and back (``to_hf``). It only
moves values, so converting there and back gives the same bits in any dtype. Both methods take the target shapes,
because the same values are stored in more than one shape (a convolution or its flattened matrix, an expert or its
transpose). ``blocks`` gives the Megatron tensor in pieces that are views, so that a rank can read its share of a tensor
and nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

SHARDED_METADATA: Mapping = MappingProxyType(
    {
        # One key per layer ("decoder.layers.7…"): layers may differ (dense and MoE), and any pipeline split loads.
        "non_homogeneous_layers": True,
        # One global tensor per weight: gate above up in `linear_fc1`, all experts of a layer stacked. The alternative,
        # one key per expert and half, has a hundred times as many entries and does not load in more layouts.
        "singleton_local_shards": False,
        # Optimizer state with its parameter's name and shape, so that it loads in any TP, PP, EP and DP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
)
"""The ``metadata`` of all ``sharded_state_dict`` calls. Pass ``dict(SHARDED_METADATA)``: Megatron adds to it."""

Shape = tuple[int, ...]


class Layout(Protocol):
    """Both directions of one conversion. Tensors may be on any device, including "meta"."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """The Megatron tensor of ``shape``, made of the HF tensors in the entry's order."""

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The HF tensors of ``shapes``, made of the Megatron tensor."""

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        """Views of the HF tensors that make up the Megatron tensor of ``shape`` when joined along axis 0."""


@dataclass(frozen=True)
class Same:
    """One HF tensor with the same values in the same order. The shape may differ (a Conv3d as a matrix)."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return parts[0].reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.reshape(shapes[0])]

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [parts[0].reshape(shape)]


@dataclass(frozen=True)
class Stacked:
    """Several HF tensors of equal size, one above the other: gate above up, as in Megatron's gated MLP."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return torch.cat(list(parts)).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(tensor.chunk(len(shapes)))

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return list(parts)


@dataclass(frozen=True)
class GroupedQkv:
    """q, k and v are separate in HF. Megatron's ``linear_qkv`` has for each kv group its query heads, key and value.

    Source: the ``mixed_qkv`` split in ``megatron.core.transformer.attention.SelfAttention``.
    """

    groups: int

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        rows = tensor.unflatten(0, (self.groups, -1))
        sizes = [shape[0] // self.groups for shape in shapes]
        return [part.reshape(shape) for part, shape in zip(rows.split(sizes, dim=1), shapes, strict=True)]

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        split = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return [part[group] for group in range(self.groups) for part in split]


@dataclass(frozen=True)
class FusedQkv:
    """One HF tensor with all q rows, then all k, then all v (the vision tower). Megatron has q, k, v for each head."""

    heads: int

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return parts[0].unflatten(0, (3, self.heads, -1)).transpose(0, 1).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).reshape(shapes[0])]

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        split = parts[0].unflatten(0, (3, self.heads, -1))
        return [split[which, head] for head in range(self.heads) for which in range(3)]


@dataclass(frozen=True)
class Experts:
    """All experts of a layer, [experts, out, in] in Megatron. HF has the same or, in the released folders, transposes.

    Only the shape tells which of them, and a square matrix counts as not transposed. This is transformers' own rule
    (``Transpose(check_dims=True)`` in its conversion mapping for qwen3_vl_moe).
    """

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return _turned(parts[0], shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [_turned(tensor, shapes[0])]

    def blocks(self, parts: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [_turned(parts[0], shape)]


def views_of_box(blocks: Sequence[Tensor], offset: Shape, shape: Shape) -> Iterator[tuple[slice, Tensor]]:
    """A box of the tensor that ``blocks`` make up when joined along axis 0, without a copy.

    Args:
        blocks: from ``Layout.blocks``.
        offset: where the box begins, in numbers along each axis.
        shape: its size. Rows beyond the last block are left out.

    Yields:
        The rows of the box that a block has, and the view of them.
    """
    first, last, end = offset[0], offset[0] + shape[0], 0
    for block in blocks:
        begin, end = end, end + len(block)
        if begin < last and first < end:
            view = block[max(first - begin, 0) : last - begin]
            for axis in range(1, len(shape)):
                view = view.narrow(axis, offset[axis], shape[axis])
            place = max(begin - first, 0)
            yield slice(place, place + len(view)), view


def _turned(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor if tuple(tensor.shape) == tuple(shape) else tensor.transpose(-1, -2)
