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
from megavlm.config.train_section import TrainSettings
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import PARTS
from megavlm.optim.stored_adam import AT_A_TIME, is_stored, state_bytes
from megavlm.plan.stage_operators import Counts
from megavlm.tracing.absent_rank import TrainedModel
from megavlm.tracing.stand_in import layers_of
from megavlm.tracing.static_memory import StaticMemory, tensors_of


class Held(NamedTuple):
    """What a rank holds of each model, and bytes of further moments (see ``Stage``); the operators of an update."""

    each: Sequence[StaticMemory]
    loaded: int
    sampling: int
    updating: int
    saving: int
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
    of_dense = _Shared("decoder", world_size // (parallel.tensor * parallel.pipeline))
    of_experts = _Shared("decoder", world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor))
    here, grown, each, in_layers, further = _Sum(settings.train), Counter[_Shared](), [], 0, 0
    for vlm, static in zip((model.vlm for model in trained), few.each, strict=True):
        tower, known, more = vlm.vision.layers, set[int](), _Sum(settings.train)
        for module in (module for part in PARTS if part != "language" for module in vlm.modules_of(part)):
            here.add(tensors_of(module), 1, _Shared("tower", world_size))
        more.add(tensors_of(tower[-1]), shapes.vision.layers - len(tower), _Shared("tower", world_size))
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
            others = [tensor for layer in layers for tensor in tensors_of(layer) if id(tensor) not in known]
            in_layers += sum(tensor.nbytes for tensor in (*inside, *others))
            more.add(others, whole / len(layers) - 1, of_dense)
        each.append(static + more.static)
        further += more.static.weights
        grown += more.gradients
    before, after = (sum(ones, StaticMemory()) for ones in (few.each, each))
    copies = before.others * after.weights // max(before.weights, 1)
    each[0] = replace(each[0], others=max(before.others, copies) if before.others else 0)
    times = whole / len(trained[0].vlm.language[0].decoder.layers)
    most = int(settings.rollout.cache_gib * 2**30)
    return Held(
        each,
        # Linear layers in 4 bits are loaded in full precision: what that is more than they hold grows with the layers.
        after.weights + round((few.loaded - before.weights) * (1 + further / max(in_layers, 1))),
        min(round(few.sampling * times), most),
        _updating(settings.train, few.updating, times, after.optimizer + after.on_host),
        few.saving,
        _update(few, before, after, here.gradients, grown, overlaps=settings.train.overlap.gradients),
    )


def _updating(train: TrainSettings, few: int, layers: float, state: int) -> int:
    """Bytes that an update makes, if it makes ``few`` with few layers: with so many times the layers, and this state.

    Muon makes all its updates. Adam makes what its largest matrices need, such as the word embedding, which is there;
    if its state is brought to the GPU, as much as is brought at a time.
    """
    if train.optimizer == "muon":
        return round(few * layers)
    return max(few, min(12 * AT_A_TIME, state)) if is_stored(train) else few


class _Shared(NamedTuple):
    """The part that gradients belong to, "tower" (with the projector) or "decoder", and how many ranks share them."""

    part: str
    ranks: int


class _Sum:
    """Sums weights with their gradients in float32 and Adam's state."""

    def __init__(self, train: TrainSettings) -> None:
        self.static, self._train = StaticMemory(), train
        self.gradients: Counter[_Shared] = Counter()  # bytes

    def add(self, tensors: Iterable[Tensor], times: float, shared: "_Shared") -> None:
        """Adds tensors so many times."""
        kept = list(tensors)
        gradients = round(times * sum(4 * tensor.numel() for tensor in kept if tensor.requires_grad))
        weights = round(times * sum(tensor.nbytes for tensor in kept))
        state, on_host = gradients // 4 * state_bytes(self._train) // shared.ranks, self._train.offload_optimizer
        self.static += StaticMemory(weights, gradients, 0 if on_host else state, on_host=state if on_host else 0)
        self.gradients[shared] += gradients


def _update(
    few: Held,
    before: StaticMemory,
    after: StaticMemory,
    here: Counter[_Shared],
    grown: Counter[_Shared],
    *,
    overlaps: bool,
) -> dict[str, Counts]:
    """The operators of an update: collectives grow as the gradients of their ranks, the rest as state or gradients."""
    states = [static.optimizer + static.on_host for static in (before, after)]
    of_state = states[1] / states[0] if states[0] else 1.0
    update: dict[str, Counts] = {}
    for part, counts in few.update.items():
        if part == "optimizer":
            weights = _reduced({call: n for call, n in counts.items() if call.kind == "collective"}, here, grown)
            update[part] = {call: weights.get(call, n * of_state) for call, n in counts.items()}
            continue
        parts = {"overlapped": {"decoder"}}.get(part, {"tower"} if overlaps else {"tower", "decoder"})
        update[part] = _reduced(
            counts,
            Counter({one: size for one, size in here.items() if one.part in parts}),
            Counter({one: size for one, size in grown.items() if one.part in parts}),
        )
    return update


def _reduced(counts: Counts, here: Counter[_Shared], grown: Counter[_Shared]) -> Counts:
    """The operators of a reduction, when gradients grow by so much."""
    of_all = 1 + grown.total() / max(here.total(), 1)
    sizes = {one.ranks: [0, 0] for one in here}
    for one, size in here.items():
        sizes[one.ranks][0] += size
        sizes[one.ranks][1] += grown[one]
    of_group = {ranks: 1 + more / max(size, 1) for ranks, (size, more) in sizes.items()}
    return {
        call: count * (of_group.get(len(call.sizes), of_all) if call.kind == "collective" else of_all)
        for call, count in counts.items()
    }
