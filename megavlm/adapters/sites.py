"""The weights that can have adapters: the linear layers of the model on this rank, and how each is sharded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megavlm.convert.names import Entry, table
from megavlm.convert.tensor_order import GroupedQkv, Layout
from megavlm.model.vlm import VLM

COLUMN, ROW = 0, 1  # axis of the weight [out, in] that is sharded over tensor-parallel ranks
_CUT = {"linear_qkv": COLUMN, "linear_fc1": COLUMN, "linear_proj": ROW, "linear_fc2": ROW}


@dataclass(frozen=True)
class Expert:
    """Expert number ``index`` of ``count``; ``dp_rank`` numbers this rank's copy of it among data-parallel ranks."""

    index: int
    count: int
    dp_rank: int


@dataclass(frozen=True)
class AdapterSite:
    """One weight of a linear layer.

    Attributes:
        root: the module that owns its adapter: a decoder chunk, the tower or the projector.
        linear: the layer, Megatron's or torch's. A grouped linear layer has one site for each of its experts.
        entry: the weight's row in the table of names.
        cut: COLUMN or ROW.
        group: the ranks over which the weight is sharded; None if it is not sharded.
        sequence_parallel: whether these ranks have different tokens outside of the layer.
        expert: the expert to which the weight belongs; None outside of experts.
        allreduce: Megatron's mark of parameters whose gradients are reduced over all data-parallel ranks. It is False
            for experts that are distributed over ranks.
        replicated: whether each rank of the world has a full copy of the weight and its own frames.
    """

    root: nn.Module
    linear: nn.Module
    entry: Entry
    cut: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    expert: Expert | None = None
    allreduce: bool = True
    replicated: bool = False

    @property
    def ranks(self) -> int:
        """The number of ranks over which the weight is sharded."""
        return self.group.size() if self.group is not None else 1

    @property
    def layout(self) -> Layout:
        """The order of the rows of the HF linear layers in this rank's share of the weight."""
        layout = self.entry.layout
        return replace(layout, groups=layout.groups // self.ranks) if isinstance(layout, GroupedQkv) else layout

    def share(self, tensor: Tensor, axis: int | None) -> Tensor:
        """This rank's piece of a global tensor; the whole tensor if ``axis`` is None."""
        if axis is None or self.group is None or self.ranks == 1:
            return tensor
        return tensor.chunk(self.ranks, dim=axis)[self.group.rank()]

    def own_tokens(self) -> bool:
        """Whether ranks have different inputs, so that each must draw its own random numbers for dropout."""
        return (
            self.replicated or self.expert is not None or (self.ranks > 1 and self.cut == ROW) or self.sequence_parallel
        )

    # The token dispatcher gathers the inputs of experts over the group and sums their outputs, so experts need no
    # communication here, except for the gradients of replicated parameters (``of_ranks``).

    def cross(self, hidden: Tensor) -> Tensor:
        """The communication over ranks between the two matrices of an adapter, on the hidden tensor [t, …, r]."""
        if self.ranks == 1 or self.expert is not None:
            return hidden
        if self.cut == COLUMN and self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.group)
        if self.cut == COLUMN:
            return tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.group)
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.group)

    def of_ranks(self, whole: Tensor) -> Tensor:
        """A parameter that is replicated over the ranks, such that its gradient is summed over them."""
        if self.ranks == 1:
            return whole
        return tensor_parallel.copy_to_tensor_model_parallel_region(whole, group=self.group)


def adapter_sites(vlm: VLM) -> Iterator[AdapterSite]:
    """The weights of all linear layers on this rank, those of the decoder first, in the order of the layers."""
    entries = {entry.key.removesuffix(".weight"): entry for entry in table(vlm.shapes)}
    groups = vlm.groups.language
    for chunk in vlm.language:
        for layer in chunk.decoder.layers:
            for name, linear in _linears(layer):
                key = f"language.decoder.layers.{layer.layer_number - 1}.{name}"
                if ".experts." not in name:
                    yield AdapterSite(
                        chunk, linear, entries[key], _cut(name), groups.tp, vlm.decoder_config.sequence_parallel
                    )
                else:
                    yield from _experts(vlm, chunk, linear, key, entries)
    for layer in vlm.vision.layers:
        for name, linear in _linears(layer):
            entry = entries[f"vision.layers.{layer.layer_number - 1}.{name}"]
            yield AdapterSite(vlm.vision, linear, entry, _cut(name), replicated=True)
    for name, linear in _linears(vlm.projector):
        yield AdapterSite(vlm.projector, linear, entries[f"projector.{name}"], _cut(name), replicated=True)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_modules() if name.rpartition(".")[2] in _CUT)


def _cut(name: str) -> int:
    return _CUT[name.rpartition(".")[2]]


def _experts(
    vlm: VLM, chunk: nn.Module, linear: nn.Module, key: str, entries: dict[str, Entry]
) -> Iterator[AdapterSite]:
    """The site of one local expert ("….local_experts.3.linear_fc1"), or those of all experts of a grouped layer."""
    assert vlm.shapes.text.moe is not None, "only a mixture of experts has experts"
    groups, count = vlm.groups.language, vlm.shapes.text.moe.num_experts
    here = count // groups.ep.size()
    module, _, kind = key.rpartition(".")
    head, _, local = module.partition(".local_experts.")
    head = head.removesuffix(".experts")
    allreduce = getattr(next(linear.parameters()), "allreduce", True)
    for index in [int(local)] if local else range(here):
        expert = Expert(groups.ep.rank() * here + index, count, groups.expt_dp.rank())
        entry = entries[f"{head}.experts.experts.{kind}"]
        yield AdapterSite(chunk, linear, entry, _cut(kind), groups.expt_tp, expert=expert, allreduce=allreduce)
