"""Records the operators that code runs: what they compute, what they read and write, and what ranks send each other.

On the meta device nothing is computed, so the record of a large model takes seconds. Real tensors are recorded as well.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megavlm.platform import Groups
from megavlm.tracing.dispatch import Dispatch

EXPERTS = "experts"
"""The phase of the operators of experts."""
_aten = torch.ops.aten
_UNMOVED = {  # these change or make a description of a tensor and touch no values
    "_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "_local_scalar_dense", "is_nonzero", "resize_", "set_", "record_stream",
}  # fmt: skip
_FILLED = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "zero_", "fill_"}
# Of these only the part that is looked up, or written to, is moved, not the whole of their first tensor.
_LOOK_UPS = {"embedding", "index_select", "gather", "index", "select_backward", "slice_backward", "masked_select"}
_WRITE_PARTS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "_index_put_impl_"}
_ATTENTION = "_scaled_dot_product_"
_SENT = {  # c10d's operators: the argument with what a rank hands over, and the name of the collective
    "allreduce_": (0, "all_reduce"),
    "allreduce_coalesced_": (0, "all_reduce"),
    "_allgather_base_": (1, "all_gather"),
    "allgather_": (1, "all_gather"),
    "allgather_into_tensor_coalesced_": (1, "all_gather"),
    "_reduce_scatter_base_": (1, "reduce_scatter"),
    "reduce_scatter_": (1, "reduce_scatter"),
    "reduce_scatter_tensor_coalesced_": (1, "reduce_scatter"),
    "alltoall_base_": (1, "all_to_all"),
    "alltoall_": (1, "all_to_all"),
    "broadcast_": (0, "broadcast"),
    "reduce_": (0, "reduce"),
    "gather_": (1, "gather"),
    "scatter_": (1, "scatter"),
    "send": (0, "send"),
}


class Call(NamedTuple):
    """An operator with its size. Operators of equal size are equal.

    Attributes:
        kind: "product", "attention", "elementwise" (everything else that moves values), "collective", or "host"
            (copies between host memory and the device, which are not recorded).
        name: torch's name, such as "mm", or that of a collective, such as "all_gather".
        sizes: product: (batch, m, k, n). attention: (batch, heads, queries, keys, head dimension, causal). collective:
            the ranks that take part. Otherwise ().
        dtype: of what is read, such as "bfloat16".
        flops: operations of products and attention, otherwise 0.
        moved: bytes read and written; of a collective, bytes that this rank hands over.
        group: of a collective, the name of its group of ranks (``group_names``), otherwise "".
    """

    kind: str
    name: str
    sizes: tuple[int, ...]
    dtype: str
    flops: int
    moved: int
    group: str = ""


class Place(NamedTuple):
    """Where in a step an operator runs.

    Attributes:
        phase: one of ``monitor.phases.PHASES``.
        backward: whether in a backward pass, or in anything else that comes after the decoder's schedule.
    """

    phase: str
    backward: bool


@dataclass(frozen=True)
class Example:
    """An operator with its arguments, in which a ``TensorOf`` is in the place of each tensor. It can be pickled.

    Attributes:
        name: namespace, name and overload, such as ("aten", "add", "Tensor").
        args, kwargs: the arguments.
    """

    name: tuple[str, str, str]
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def func(self) -> Callable[..., Any]:
        """The operator."""
        namespace, name, overload = self.name
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)


class TensorOf(NamedTuple):
    """A description of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operators(Dispatch):
    """Within the block, counts operators on a device, and the collectives of all devices.

    Args:
        where: the device.
        groups: the names of process groups, by torch's own names; others are "other".
        keep_examples: whether to keep ``examples``.

    Attributes:
        phase: the phase to which operators belong now.
        found: how often each operator was called, by place.
        weights: storages of the weights of experts and of their gradients. In the phase ``EXPERTS``, elementwise
            operators have sizes (1,) if their first tensor is in one of them, otherwise (0,).
        examples: for each operator but collectives, one with its arguments.
    """

    def __init__(self, where: torch.device, groups: Mapping[str, str], *, keep_examples: bool = False):
        super().__init__()
        self._where, self._groups, self._keep = where.type, groups, keep_examples
        self._phase, self._is_late = "other", False
        self.found: Counter[tuple[Place, Call]] = Counter()
        self.weights: set[int] = set()
        self.examples: dict[Call, Example] = {}

    @property
    def phase(self) -> str:
        """See above."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._is_late |= self._phase == "decoder" and name == "other"  # the schedule has ended
        self._phase = name

    def see(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        is_collective = func.namespace == "c10d"
        call = self._collective(func, args) if is_collective else self._call(func, args, kwargs, result)
        if call is not None:
            backward = self._is_late or torch._C._current_autograd_node() is not None
            self.found[Place(self.phase, backward), call] += 1
            if self._keep and not is_collective and call not in self.examples:
                self.examples[call] = Example(
                    (func.namespace, func.overloadpacket.__name__, func._overloadname),
                    _described(list(args)),
                    _described(kwargs),
                )

    def _call(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Call | None:
        packet = func.overloadpacket
        name = packet.__name__
        if func.is_view or name in _UNMOVED:
            return None
        made = [t for t in tensors_in((result,)) if t.device.type == self._where]
        read = [t for t in tensors_in((*args, *kwargs.values())) if t.device.type == self._where]
        if not (made or read):
            return None
        first = (read or made)[0]
        if name == "_to_copy" and first is made[0]:  # from another device
            return None
        dtype, kind, flops = str(first.dtype).removeprefix("torch."), "elementwise", 0
        sizes: tuple[int, ...] = ()
        if name.startswith(_ATTENTION):
            kind, sizes, flops = "attention", *_attention(func, args, kwargs, backward=name.endswith("backward"))
        elif packet in flop_registry or packet is _aten.addmm_:
            left, right = [t for t in tensors_in(args) if t.dim() >= 2][-2:]  # behind what they are added to
            kind, sizes = "product", (left.shape[0] if left.dim() == 3 else 1, *left.shape[-2:], right.shape[-1])
            flops = 2 * math.prod(sizes)
        elif self._phase == EXPERTS:
            sizes = (int(first.untyped_storage()._cdata in self.weights),)
        written = sum(map(nbytes, made)) if made else nbytes(first)  # those that return nothing write in place
        if name in _FILLED:
            moved = written
        elif name in _LOOK_UPS:
            moved = 2 * written
        elif name in _WRITE_PARTS:
            moved = 3 * sum(map(nbytes, read[1:]))
        else:
            moved = written + sum(map(nbytes, read))
        return Call(kind, name, sizes, dtype, flops, moved)

    def _collective(self, func: Any, args: tuple) -> Call | None:
        name = func.overloadpacket.__name__
        if name not in _SENT:
            return None  # receiving, waiting
        at, kind = _SENT[name]
        group = next((_group(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _group(arg)), None)
        assert group is not None, f"{name} has no group"
        tensors = list(tensors_in((args[at],)))
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        ranks = tuple(dist.get_process_group_ranks(group))
        if kind == "send":
            ranks = (dist.get_rank(), ranks[int(args[2])])
        if len(ranks) == 1:
            return None
        # Megatron sends one of the two directions between two stages in the group of all ranks
        name = "pipeline" if kind == "send" else self._groups.get(group.group_name, "other")
        return Call("collective", kind, ranks, dtype, 0, sum(map(nbytes, tensors)), name)


def tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    """All tensors in the arguments or the results of an operation, which may be lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values; those that an expanded tensor repeats count once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _attention(func: Any, args: tuple, kwargs: dict[str, Any], *, backward: bool) -> tuple[tuple[int, ...], int]:
    """Sizes and operations of attention. A causal one counts as half; the backward pass computes the scores again."""
    query, key = args[backward], args[backward + 1]
    at = {argument.name: place for place, argument in enumerate(func._schema.arguments)}["is_causal"]
    causal = bool(args[at] if len(args) > at else kwargs.get("is_causal", False))
    batch, heads, n, dim = query.shape
    flops = 4 * batch * heads * n * key.shape[2] * dim // (2 if causal else 1)
    return (batch, heads, n, key.shape[2], dim, int(causal)), flops * 5 // 2 if backward else flops


def _group(argument: torch.ScriptObject) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None  # the operation of a reduction is a script object, too


def group_names(groups: Groups) -> dict[str, str]:
    """What the groups of ranks are for, by torch's own names of them.

    "data" also reduces the gradients of the tower, which every rank holds; "tower" sends pixels and features.
    """
    language, tower = groups.language, groups.tower
    kinds = {
        "tensor": ("tp",), "context": ("cp",), "pipeline": ("pp", "embd", "pos_embd"),
        "expert": ("ep", "expt_tp", "tp_ep"), "data": ("dp", "dp_cp", "expt_dp", "intra_dist_opt", "mp", "tp_ep_pp"),
    }  # fmt: skip
    found: dict[str, str] = {}
    for kind, names in kinds.items():
        for group in (getattr(language, name, None) for name in names):
            if isinstance(group, dist.ProcessGroup):
                found.setdefault(group.group_name, kind)
    shared = [groups.model_parallel, *([groups.sharing.ranks] if groups.sharing is not None else [])]
    for group in shared:
        found.setdefault(group.group_name, "tower")
    found.setdefault(tower.dp.group_name, "data")
    return found


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorOf(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return [_described(one) for one in value]
    return {name: _described(one) for name, one in value.items()} if isinstance(value, dict) else value
