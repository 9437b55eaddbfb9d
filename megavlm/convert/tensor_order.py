"""How the numbers of one weight lie in memory in Hugging Face's and in Megatron's form, both ways.

A layout turns the HF tensors of one table entry into the one Megatron tensor (``to_mcore``) and back (``to_hf``). It
only moves numbers, so the way there and back gives the same bits in any dtype. Each takes the wanted shapes, because
the same numbers are stored in more than one shape (a convolution or its flattened matrix, an expert or its transpose).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

SHARDED_METADATA: Mapping = MappingProxyType(
    {
        # A key per layer ("decoder.layers.7…"): layers may differ (dense beside MoE), any pipeline split loads.
        "non_homogeneous_layers": True,
        # One global tensor per weight: gate over up in `linear_fc1`, all experts of a layer stacked. The alternative
        # has a key per expert and half, a hundred times the entries, and loads in no more layouts than this one.
        "singleton_local_shards": False,
        # Optimizer state under its parameter's name and shape: loads in any TP, PP, EP and DP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
)
"""The ``metadata`` of every ``sharded_state_dict`` call. Hand over ``dict(SHARDED_METADATA)``: Megatron adds to it."""

Shape = tuple[int, ...]


class Layout(Protocol):
    """Both directions of one arrangement. Tensors may be on any device, also "meta"."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """The Megatron tensor of ``shape`` out of the HF tensors, in the entry's order."""

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The HF tensors of ``shapes`` out of the Megatron tensor."""


@dataclass(frozen=True)
class Same:
    """One HF tensor, the same numbers in the same order; the shape may differ (Conv3d as a matrix)."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return parts[0].reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.reshape(shapes[0])]


@dataclass(frozen=True)
class Stacked:
    """Several HF tensors of equal size, one above the other: gate over up, as Megatron's gated MLP has them."""

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return torch.cat(list(parts)).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(tensor.chunk(len(shapes)))


@dataclass(frozen=True)
class GroupedQkv:
    """q, k and v apart in HF; in Megatron's ``linear_qkv``, for each kv group, its query heads, its key, its value.

    Source: the ``mixed_qkv`` split in ``megatron.core.transformer.attention.SelfAttention``.
    """

    groups: int

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        rows = tensor.unflatten(0, (self.groups, -1))
        sizes = [shape[0] // self.groups for shape in shapes]
        return [part.reshape(shape) for part, shape in zip(rows.split(sizes, dim=1), shapes, strict=True)]


@dataclass(frozen=True)
class FusedQkv:
    """One HF tensor with all q rows, then all k, then all v (the vision tower); in Megatron per head q, k, v."""

    heads: int

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return parts[0].unflatten(0, (3, self.heads, -1)).transpose(0, 1).reshape(shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).reshape(shapes[0])]


@dataclass(frozen=True)
class Experts:
    """All experts of a layer, [experts, out, in] in Megatron. HF has that or, in the released folders, the transpose.

    Which one is told by the shape alone, and a square matrix is taken as not transposed: transformers' own rule
    (``Transpose(check_dims=True)`` in its conversion mapping for qwen3_vl_moe).
    """

    def to_mcore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        return _turned(parts[0], shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [_turned(tensor, shapes[0])]


def _turned(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor if tuple(tensor.shape) == tuple(shape) else tensor.transpose(-1, -2)
