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
    """What a rank holds of each model (see ``Stage``), the bytes of the sampling, and the operators of an update."""

    each: Sequence[StaticMemory]
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
    here, grown, each = _Sum(), Counter[int](), []
    for vlm, static in zip((model.vlm for model in trained), few.each, strict=True):
        tower, known, more = vlm.vision.layers, set[int](), _Sum()
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
        each.append(static + more.static)
        grown += more.gradients
    before, after = (sum(ones, StaticMemory()) for ones in (few.each, each))
    copies = before.others * after.weights // max(before.weights, 1)
    each[0] = replace(each[0], others=max(before.others, copies) if before.others else 0)
    times = whole / len(trained[0].vlm.language[0].decoder.layers)
    most = int(settings.rollout.cache_gib * 2**30)
    return Held(each, min(round(few.sampling * times), most), _update(few, before, after, here.gradients, grown))


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


def _update(
    few: Held, before: StaticMemory, after: StaticMemory, here: Counter[int], grown: Counter[int]
) -> dict[str, Counts]:
    """The operators of an update: collectives grow as the gradients of their ranks, the rest as state or gradients."""
    of_group = {ranks: 1 + grown[ranks] / max(size, 1) for ranks, size in here.items()}
    of_all = after.gradients / max(before.gradients, 1)
    of_state = after.optimizer / before.optimizer if before.optimizer else of_all

    def ratio(part: str, call: Call) -> float:
        if call.kind == "collective":
            return of_group.get(len(call.sizes), of_all)
        return of_state if part == "optimizer" else of_part[part]

    of_part = {part: _mean(counts, of_group, of_all) for part, counts in few.update.items()}
    return {
        part: {call: count * ratio(part, call) for call, count in counts.items()} for part, counts in few.update.items()
    }


def _mean(counts: Counts, of_group: Mapping[int, float], of_all: float) -> float:
    """By how much the bytes of a part's collectives grow."""
    moved = {call: count * call.moved for call, count in counts.items() if call.kind == "collective"}
    if not moved:
        return of_all
    return sum(size * of_group.get(len(call.sizes), of_all) for call, size in moved.items()) / sum(moved.values())
