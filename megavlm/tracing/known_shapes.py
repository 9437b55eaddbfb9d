"""Operators on the meta device, each computed once for tensors of equal description.

Many of torch's functions for the meta device are written in Python and take longer than making a tensor. Layers are
alike, so nearly all calls of a step have been made before with arguments of the same shapes.
"""

from typing import Any

import torch
from torch import Tensor

from megavlm.tracing.dispatch import Dispatch

_Description = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[tuple, list[_Description] | None] = {}  # [] if it changes its first argument
_kinds: dict[int, tuple[Any, str | None]] = {}  # of operators by their id, with themselves, which keeps it
_MOST = 100_000  # so that they take little memory


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of an operator of torch; of a known one on the meta device, tensors of the known description.

    Of the operators whose result shares memory with an argument, only those that change the values of their first one
    and nothing else are known; views are made each time.
    """
    number = id(func)  # torch computes the hash of an operator in Python
    if number not in _kinds:
        _kinds[number] = func, _kind(func)
    kind = _kinds[number][1]
    if kind is None:
        return func(*args, **kwargs)
    key = (number, _described(args), *[(name, _described(value)) for name, value in kwargs.items()])
    try:
        found = _known.get(key)
    except TypeError:  # an argument that has no hash
        return func(*args, **kwargs)
    if found is not None:
        if kind == "in place":
            return args[0]
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in found]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)
    result = func(*args, **kwargs)
    if key not in _known and len(_known) < _MOST:
        if kind == "new":
            _known[key] = _descriptions(result, args)
        else:
            _known[key] = [] if result is args[0] and result.is_meta and _described(args) == key[1] else None
    return result


def _kind(func: Any) -> str | None:
    """Whether an operator makes "new" tensors, or changes the values of its first argument "in place", or neither."""
    schema = func._schema
    if func.namespace != "aten" or not schema.returns or {str(one.type) for one in schema.returns} != {"Tensor"}:
        return None
    shared = [one.alias_info is not None for one in (*schema.arguments, *schema.returns)]
    if not any(shared):
        return "new"
    first = schema.arguments[0].alias_info
    is_in_place = first is not None and first.is_write and sum(shared) == 2 and len(schema.returns) == 1 and shared[-1]
    return "in place" if is_in_place and func.overloadpacket.__name__ != "set_" else None


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple([_described(one) for one in value])
    return type(value), value


def _descriptions(result: Any, args: tuple) -> list[_Description] | None:
    """What is needed to make tensors like these; None if that is not enough."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    given = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
    for one in tensors:
        if not isinstance(one, Tensor) or not one.is_meta or one.storage_offset():
            return None
        storage = one.untyped_storage()
        if storage.nbytes() != _extent(one) or storage._cdata in given:  # _unsafe_view shares without saying so
            return None
    return [(one.shape, one.stride(), one.dtype) for one in tensors]


def _extent(tensor: Tensor) -> int:
    """Bytes of the storage that a tensor of this shape and stride needs."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class KnownShapes(Dispatch):
    """Within the block, operators are carried out by ``run``."""

    def carry_out(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return run(func, args, kwargs)
