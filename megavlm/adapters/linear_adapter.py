"""The base class of the adapters of a linear layer: parameters, sharded like the layer, and checkpoint entries."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megavlm.adapters.sites import COLUMN, AdapterSite
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.peft_names import CHECKPOINT_PREFIX, LORA_A, LORA_B, MAGNITUDE, Linear, tensor_shapes
from megavlm.platform import device


class LinearAdapter(nn.Module, ABC):
    """The adapter of one weight of a Megatron linear layer, which may fuse several HF linear layers (q, k, v).

    Each HF layer that is a target has its own tensors with the names, shapes and order of peft; they are sharded over
    ranks like the Megatron layer. Subclasses define the change of the layer's output.

    Args:
        site: the weight to which the adapter belongs.
        settings: the ``adapter`` section.
        targets: the HF linear layers that have an adapter, by name.
        dtype: of the adapter's parameters.

    Attributes:
        parts: for each HF linear layer of the site, in order, its Linear, or None if it is not a target.
        rows: for each HF linear layer of the site, its rows in this rank's share of the weight.
        names: for each parameter, its HF linear layer, its kind and the axis along which it is sharded.
    """

    def __init__(self, site: AdapterSite, settings: AdapterSettings, targets: dict[str, Linear], dtype: torch.dtype):
        super().__init__()
        self.site, self.settings = site, settings
        names = [name.removesuffix(".weight") for name in site.entry.hf]
        self.parts = [targets.get(name) for name in names]
        outs = [shape[-2] for shape in site.entry.hf.values()]
        self.rows = [out // site.ranks if site.cut == COLUMN else out for out in outs]
        self.names: dict[str, tuple[Linear, str, int | None]] = {}
        for number, part in enumerate(self.parts):
            if part is None:
                continue
            for kind, shape in tensor_shapes(settings, part).items():
                shape = shape[1:] if part.experts else shape
                axis = self._cut_axis(part, kind)
                local = site.share(torch.empty(shape, device="meta"), axis)
                parameter = nn.Parameter(torch.zeros(local.shape, dtype=dtype, device=device()))
                self._mark(parameter, axis)
                if kind == LORA_B:
                    parameter.lr_scale = settings.lr_ratio  # type: ignore[attr-defined]  # read by optim/param_groups.py
                name = f"{kind.partition('.')[0]}_{number}"
                self.register_parameter(name, parameter)
                self.names[name] = (part, kind, axis)

    def _cut_axis(self, part: Linear, kind: str) -> int | None:
        if self.site.cut == COLUMN:
            return {LORA_B: len(part.rows) - 1, MAGNITUDE: 0}.get(kind)
        return {LORA_A: 1}.get(kind)

    def _mark(self, parameter: nn.Parameter, axis: int | None) -> None:
        """Set the attributes by which Megatron reduces gradients over ranks and counts each parameter once in norms."""
        marks: dict[str, bool | int] = {
            "allreduce": self.site.allreduce,
            "sequence_parallel": axis is None and self.site.sequence_parallel,
        }
        if axis is not None:
            marks |= {"tensor_model_parallel": True, "partition_dim": axis, "partition_stride": 1}
        for name, value in marks.items():
            setattr(parameter, name, value)

    def of_kind(self, kind: str) -> list[nn.Parameter | None]:
        """For each part, its tensor of a kind, or None if it has none."""
        found = {id(part): getattr(self, name) for name, (part, k, _) in self.names.items() if k == kind}
        return [found.get(id(part)) for part in self.parts]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Join tensors [rows of a part, …] in the row order of this rank's share of the fused weight: [out, …]."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return self.site.layout.to_mcore(parts, shape)

    @torch.no_grad()
    def begin(self, read: Callable[[str, int | None], dict[str, Tensor]] | None, seed: int) -> None:
        """Set the initial values: those that ``read`` returns, or values that do not change the layer's output.

        Without ``read``, A is drawn from peft's distribution (uniform up to 1/√in). The draw depends only on the name
        and ``seed``, so it is the same in every layout.

        Args:
            read: returns the stored tensors of an HF linear layer (and expert) by kind; None: new values.
            seed: seed of new values.
        """
        expert = self.site.expert.index if self.site.expert else None
        stored = {part.name: read(part.name, expert) for part in self.parts if part} if read else {}
        for name, (part, kind, axis) in self.names.items():
            parameter = getattr(self, name)
            if read:
                whole = stored[part.name][kind]
            elif kind == LORA_A:
                shape = (tensor_shapes(self.settings, part)[kind])[-2:]
                draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part.name} {expert}".encode()))
                whole = (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(part.inner)
            else:
                continue
            parameter.copy_(self.site.share(whole, axis))

    def sharded_state_dict(self, prefix: str, offsets: tuple, metadata: dict | None) -> dict:
        """The sharded entries with Hugging Face names, so that they can be loaded in any layout."""
        assert metadata is not None, "the checkpoint passes process groups in the metadata"
        entries, site = {}, self.site
        for name, (part, kind, axis) in self.names.items():
            key, offset_in_stack = f"{CHECKPOINT_PREFIX}{part.name}.", offsets
            if site.expert is not None:
                offset_in_stack = (*offsets, (len(offsets), site.expert.index, site.expert.count))
            cut = {} if axis is None else {kind: axis}
            entry = make_sharded_tensors_for_checkpoint(
                {kind: getattr(self, name)},
                key,
                cut,
                offset_in_stack,
                tp_group=site.group if site.group is not None else metadata["alone"],
                dp_cp_group=metadata["dp_cp_group"],
            )[key + kind]
            if site.expert is not None:
                entry.replica_id = (*entry.replica_id[:2], site.expert.dp_rank)
            entries[prefix + name] = entry
        return entries

    @abstractmethod
    def forward(self, linear: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """The joint output [t', …, out] of the linear layer and its adapter on this rank.

        Args:
            linear: the layer.
            inputs: [t, …, in], the inputs of the layer.
            output: [t', …, out], the output of the layer on this rank.
        """
