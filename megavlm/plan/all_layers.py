"""What a stage holds and how it is updated, told from a model with few of its layers and experts, without padding.

Data-parallel ranks share gradients and optimizer state. How many share those of experts, of the tower and of the rest
differs, so these three grow by different ratios.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import PARTS
from megavlm.plan.stage_operators import Counts
from megavlm.tracing.absent_rank import TrainedModel
from megavlm.tracing.operators import Call
from megavlm.tracing.stand_in import layers_of
from megavlm.tracing.static_memory import StaticMemory, tensors_of


class Held(NamedTuple):
    """What a rank holds all the time, the bytes of the sampling, and the operators of an update."""

    static: StaticMemory
    sampling: int
    update: Mapping[str, Counts]


def of_all_layers(
    few: Held, trained: Sequence[TrainedModel], settings: Settings, shapes: Shapes, world_size: int, stage: int
) -> Held:
    """What a rank of a pipeline stage holds with all layers and experts.

    Args:
        few: what it holds with few of them.
        trained: its models, built with few.
        settings, shapes, world_size: those of the run.
        stage: the pipeline stage.
    """
    parallel = settings.parallel
    whole = layers_of(parallel, shapes.text.layers, stage)
    of_dense = world_size // (parallel.tensor * parallel.pipeline)
    of_experts = world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor)
    here, more = _Sum(), _Sum()
    for vlm in (model.vlm for model in trained):
        tower, known = vlm.vision.layers, set[int]()
        for module in (module for part in PARTS if part != "language" for module in vlm.modules_of(part)):
            here.add(tensors_of(module), 1, world_size)
        more.add(tensors_of(tower[-1]), shapes.vision.layers - len(tower), world_size)
        for chunk in vlm.language:
            layers = chunk.decoder.layers
            experts = [one for layer in layers for one in layer.modules() if isinstance(one, SequentialMLP)]
            inside = [tensor for module in experts for tensor in tensors_of(module)]
            here.add(inside, 1, of_experts)
            if experts and shapes.text.moe is not None:
                all_experts = shapes.text.moe.num_experts // parallel.expert / experts[0].num_local_experts
                more.add(inside, all_experts * whole / len(layers) - 1, of_experts)
            known |= set(map(id, inside))
            here.add((tensor for tensor in tensors_of(chunk) if id(tensor) not in known), 1, of_dense)
            others = (tensor for layer in layers for tensor in tensors_of(layer) if id(tensor) not in known)
            more.add(others, whole / len(layers) - 1, of_dense)
    static = few.static + more.static
    copies = few.static.others * static.weights // max(few.static.weights, 1)
    static = replace(static, others=max(few.static.others, copies) if few.static.others else 0)
    times = whole / len(trained[0].vlm.language[0].decoder.layers)
    most = int(settings.rollout.cache_gib * 2**30)
    return Held(static, min(round(few.sampling * times), most), _update(few, static, here, more))


class _Sum:
    """Sums weights with their gradients in float32 and Adam's state."""

    def __init__(self) -> None:
        self.static = StaticMemory()
        self.gradients: Counter[int] = Counter()  # bytes, by the number of ranks that share the state

    def add(self, tensors: Iterable[Tensor], times: float, ranks: int) -> None:
        """Adds tensors so many times; so many ranks share the state."""
        kept = list(tensors)
        gradients = round(times * sum(4 * tensor.numel() for tensor in kept if tensor.requires_grad))
        weights = round(times * sum(tensor.nbytes for tensor in kept))
        self.static += StaticMemory(weights, gradients, 3 * gradients // ranks)
        self.gradients[ranks] += gradients


def _update(few: Held, static: StaticMemory, here: _Sum, more: _Sum) -> dict[str, Counts]:
    """The operators of an update: collectives grow as the gradients of their ranks, the rest as state or gradients."""
    of_group = {ranks: 1 + more.gradients[ranks] / max(size, 1) for ranks, size in here.gradients.items()}
    of_all = static.gradients / max(few.static.gradients, 1)
    of_state = static.optimizer / few.static.optimizer if few.static.optimizer else of_all

    def grown(part: str, call: Call) -> float:
        if call.kind == "collective":
            return of_group.get(len(call.sizes), of_all)
        return of_state if part == "optimizer" else of_part[part]

    of_part = {part: _mean(counts, of_group, of_all) for part, counts in few.update.items()}
    return {
        part: {call: count * grown(part, call) for call, count in counts.items()} for part, counts in few.update.items()
    }


def _mean(counts: Counts, of_group: Mapping[int, float], of_all: float) -> float:
    """By how much the bytes of a part's collectives grow."""
    moved = {call: count * call.moved for call, count in counts.items() if call.kind == "collective"}
    if not moved:
        return of_all
    return sum(size * of_group.get(len(call.sizes), of_all) for call, size in moved.items()) / sum(moved.values())
