"""Muon inside Megatron's optimizers, as GaLore is in ``megatron_galore``, and its state in checkpoints.

Matrices are those of the linear layers (attention, MLPs, experts, mergers). Embeddings, the output layer, routers,
norms and biases are trained by AdamW. Each data-parallel rank has the complete state of its weights; it is stored by
the names of the weights, so any layout can load it.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.adapters.sites import COLUMN, AdapterSite, adapter_sites
from megavlm.config.requirements import required
from megavlm.config.train_section import TrainSettings
from megavlm.model.vlm import VLM
from megavlm.optim.megatron_galore import PartOptimizers, replicas
from megavlm.optim.muon import Muon


class SiteMatrices:
    """The whole Hugging Face matrices of a linear layer's weight. An expert's gate and up are two matrices.

    Args:
        site: the weight.
    """

    def __init__(self, site: AdapterSite):
        self._site = site
        if site.expert is None:
            self._shapes = [shape[-2:] for shape in site.entry.hf.values()]
        else:
            _, out, inner = site.entry.shape
            self._shapes = [(out // 2, inner)] * 2 if site.cut == COLUMN else [(out, inner)]

    def whole(self, piece: Tensor) -> list[Tensor]:
        """See ``muon.Matrices``."""
        site, ranks = self._site, self._site.ranks
        cut = [(out // ranks, inner) if site.cut == COLUMN else (out, inner // ranks) for out, inner in self._shapes]
        if site.expert is None:
            parts = site.layout.to_hf(piece, cut)
        else:
            parts = list(piece.chunk(len(cut)))
        if ranks == 1:
            return parts
        found = []
        for part in parts:
            pieces = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
            dist.all_gather(pieces, part.contiguous(), group=site.group)
            found.append(torch.cat(pieces, dim=site.cut))
        return found

    def piece(self, whole: list[Tensor]) -> Tensor:
        """See ``muon.Matrices``."""
        site = self._site
        parts = [site.share(matrix, site.cut) for matrix in whole]
        if site.expert is not None:
            return torch.cat(parts)
        out = sum(len(part) for part in parts)
        return site.layout.to_mcore(parts, (out, parts[0].shape[1]))


def matrices_of(vlm: VLM) -> dict[Tensor, SiteMatrices]:
    """The matrices of all linear layers on this rank, by the weights that the optimizers update (float32 copies)."""
    found: dict[Tensor, SiteMatrices] = {}
    for site in adapter_sites(vlm):
        weight = getattr(site.linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:  # Transformer Engine numbers the experts' weights
            assert site.expert is not None, site.entry.key
            here = site.expert.count // vlm.groups.language.ep.size()
            weight = getattr(site.linear, f"weight{site.expert.index % here}")
        found[getattr(weight, "main_param", weight)] = SiteMatrices(site)
    return found


def put_inside(optimizer: MegatronOptimizer, vlm: VLM, train: TrainSettings, groups: ProcessGroupCollection) -> None:
    """Replaces the optimizer that a Megatron optimizer wraps by Muon over the same float32 weights.

    Args:
        optimizer: the Megatron optimizer.
        vlm: the model.
        train: the ``train`` section.
        groups: the process groups of the part.
    """
    if optimizer.optimizer is None:
        return
    optimizer.optimizer = Muon(
        optimizer.optimizer.param_groups,
        lr=required(train.lr, "train.lr"),
        matrices=matrices_of(vlm),
        momentum=train.muon_momentum,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        group=replicas(optimizer, groups),
        dtype=torch.float32 if train.precision == "fp32" else torch.bfloat16,
    )


def state(optimization: PartOptimizers, model: dict) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """All tensors of the optimizers on this rank, including float32 weights, for saving or as the target of loading.

    Args:
        optimization: the optimizers.
        model: the sharded state of the weights.
    """
    entries = {}
    for name, key, entry, tensor in _tensors(optimization, model):
        changes: dict[str, object] = {"key": f"optimizer.state.{key}.{entry.key}", "data": tensor}
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = tensor.dtype
        entries[f"{key}/{name}"] = replace(entry, **changes)
    return entries


def load(optimization: PartOptimizers, model: dict, loaded: dict[str, Tensor]) -> None:
    """Copies the tensors that ``dist_checkpointing.load`` returned for ``state`` into the optimizers.

    Call it after the position of the schedule has been restored, because the numbers of steps follow from it.
    """
    with torch.no_grad():
        for name, key, _, tensor in _tensors(optimization, model):
            tensor.copy_(loaded[f"{key}/{name}"].view_as(tensor))
    for part, optimizers in optimization.parts.items():
        for optimizer in optimizers:
            if optimizer.optimizer is not None:
                optimizer.optimizer.steps = optimization.updates(part)


def _tensors(optimization: PartOptimizers, model: dict) -> Iterator[tuple[str, str, ShardedTensor, Tensor]]:
    """(name of the weight in ``model``, name of the state, entry of the weight, tensor)."""
    states: dict[Tensor, dict[str, Tensor]] = {}
    for optimizer in (o for optimizers in optimization.parts.values() for o in optimizers if o.optimizer is not None):
        optimizer.optimizer.fill()
        states |= {weight: optimizer.optimizer.state[weight] for weight in optimizer.get_parameters()}
    for name, entry in model.items():
        weight = getattr(entry, "data", None)
        main = getattr(weight, "main_param", weight)
        if isinstance(main, Tensor) and main in states:
            for key, tensor in {"param": main.detach(), **states[main]}.items():
                yield name, key, entry, tensor.detach()
