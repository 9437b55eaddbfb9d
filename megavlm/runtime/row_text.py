"""The text of rows (all of them but the pixels) on its way from the leader to the other ranks of its group.

It travels as one buffer of bytes, whose length is told beforehand: a short pickled head, then the tensors end to end.
Pickling the tensors as well would take ten times as long; and as every token, label and position fits into 32 bits, the
buffer has half the bytes.
"""

import pickle
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.platform.collectives import picklable

_PIXEL_FIELDS = ("pixels", "patch_coords", "pos_index", "pos_weight")
_ALIGNED = 8  # bytes; tensors begin at a multiple of it
_NARROW = {torch.int64: torch.int32}  # how a type of tensors travels, if not as it is


def without_pixels(row: Row) -> Row:
    """The row without its pixels, their position tables and the state of its loader, which only the leader needs."""
    return replace(row, loader_state=None, **{name: getattr(row, name)[:0].clone() for name in _PIXEL_FIELDS})


def share_text(
    rows: list[Row], problem: Exception | None, group: dist.ProcessGroup
) -> tuple[list[Row], Exception | None]:
    """Returns the rows of the group's first rank, which have no pixels, and its problem on every rank of the group.

    Args:
        rows: on the first rank, the rows; ignored elsewhere.
        problem: on the first rank, what has kept it from reading more.
        group: a group for tensors in host memory. Call this on all of its ranks.
    """
    if group.size() == 1:
        return rows, problem
    is_first = group.rank() == 0
    buffer = encoded(rows, problem) if is_first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(buffer)])
    dist.broadcast(size, group=group, group_src=0)
    if not is_first:
        buffer = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, group=group, group_src=0)
    return (rows, problem) if is_first else decoded(buffer)


def encoded(rows: list[Row], problem: Exception | None = None) -> torch.Tensor:
    """The rows, and a problem, as uint8 [n]."""
    tensors: list[torch.Tensor] = []
    heads: list[tuple[dict[str, Any], dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = []
    for row in rows:
        values = {field.name: getattr(row, field.name) for field in fields(row)}
        ours = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in values.items() if name not in ours}
        heads.append((others, {name: (value.dtype, tuple(value.shape)) for name, value in ours.items()}))
        tensors += ours.values()
    head = pickle.dumps((heads, problem and picklable(problem)))
    start = _aligned(_ALIGNED + len(head))
    buffer = torch.empty(start + sum(_size(t.dtype, t.numel()) for t in tensors), dtype=torch.uint8)
    buffer[:_ALIGNED].view(torch.int64).fill_(len(head))
    buffer[_ALIGNED : _ALIGNED + len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for tensor in tensors:
        _part(buffer, start, tensor.dtype, tensor.shape).copy_(tensor)
        start += _size(tensor.dtype, tensor.numel())
    return buffer


def decoded(buffer: torch.Tensor) -> tuple[list[Row], Exception | None]:
    """What ``encoded`` was given."""
    length = int(buffer[:_ALIGNED].view(torch.int64))
    heads, problem = pickle.loads(buffer[_ALIGNED : _ALIGNED + length].numpy())
    start, rows = _aligned(_ALIGNED + length), []
    for others, ours in heads:
        tensors: dict[str, Any] = {}
        for name, (dtype, shape) in ours.items():
            tensors[name] = _part(buffer, start, dtype, shape).to(dtype)
            start += _size(dtype, tensors[name].numel())
        rows.append(Row(**others, **tensors))
    return rows, problem


def _part(buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """The view of the buffer that holds a tensor."""
    narrow = _NARROW.get(dtype, dtype)
    count = torch.Size(shape).numel() * narrow.itemsize
    return buffer[start : start + count].view(narrow).view(shape)


def _size(dtype: torch.dtype, count: int) -> int:
    """The bytes of the buffer that a tensor takes."""
    return _aligned(count * _NARROW.get(dtype, dtype).itemsize)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
