"""A model with few layers in the place of one with many: its last but one layer stands for all that are left out.

Layers of a kind keep the same number of bytes for the backward pass, each on top of those before it. What is alive is
therefore exact if the layers left out are counted as alive from the forward pass of the layer behind them until the
backward pass of the layer before them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from megavlm.config.sections import ParallelSettings
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.tracing.computed_again import in_backward
from megavlm.tracing.live_memory import LiveMemory
from megavlm.tracing.operators import Call, Operators, Place

_EXPERTS = 2  # of a rank, at least
_PLAIN = 3  # layers that are kept beside those with deepstack features: one, the one that is repeated, and the last


def fewer_layers(settings: Settings, shapes: Shapes, stage: int, *, rough: bool = False) -> tuple[Settings, Shapes]:
    """The settings and shapes with few layers in the tower and in each chunk of the decoder, if that can stand for all.

    On pipeline stages without deepstack features, fewer of them can: those behind a first one that has as many layers
    as there are levels of features. It cannot if the stage's chunks are short, or if some layers of the decoder have
    experts and others do not.

    Args:
        settings, shapes: those of the run.
        stage: the pipeline stage that is built.
        rough: whether the layer before the repeated one may have deepstack features.
    """
    levels = len(shapes.vision.deepstack_layers)
    # Of a chunk whose inputs are on the host, the first one stays, so that the layer behind it is not like the others.
    plain = _PLAIN + settings.train.offload_activations
    few = levels + plain
    parallel, text = settings.parallel, shapes.text
    each = few - (rough and levels > 0) if stage == 0 else max(plain, levels)
    are_alike = len({text.is_moe_layer(layer) for layer in range(text.layers)}) == 1
    if shapes.vision.layers > few:
        shapes = replace(shapes, vision=replace(shapes.vision, layers=few, deepstack_layers=tuple(range(levels))))
    has_features_elsewhere = stage > 0 and layers_of(parallel, text.layers, 0) < levels
    if are_alike and not has_features_elsewhere and layers_of(parallel, text.layers, stage) > each:
        chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
        shapes = replace(shapes, text=replace(text, layers=each * chunks))
        even = parallel.model_copy(update={"first_stage_layers": None, "last_stage_layers": None})
        settings = settings.model_copy(update={"parallel": even})
    return settings, shapes


def fewer_experts(shapes: Shapes, parallel: ParallelSettings) -> Shapes:
    """The shapes with few experts on a rank, each of which gets the tokens of several.

    Operations and activations stay as they are, but not the weights.
    """
    moe = shapes.text.moe
    if moe is None:
        return shapes
    here = moe.num_experts // parallel.expert
    counts = (n for n in range(1, here + 1) if here % n == 0 and n >= _EXPERTS and n * parallel.expert >= moe.top_k)
    few = replace(moe, num_experts=min(counts, default=here) * parallel.expert)
    return replace(shapes, text=replace(shapes.text, moe=few))


def layers_of(parallel: ParallelSettings, layers: int, stage: int) -> int:
    """The number of layers in each chunk of a pipeline stage."""
    given = {0: parallel.first_stage_layers, parallel.pipeline - 1: parallel.last_stage_layers}
    uneven = [count for count in given.values() if count is not None]
    others = parallel.pipeline - len(uneven)
    count = given.get(stage) or (layers - sum(uneven)) // max(others, 1)
    return count // (parallel.virtual_pipeline or 1)


class StandIns:
    """Counts the layers that a model lacks, while it runs.

    Args:
        memory, operators: what counts.
        layers: the layers of the tower or of a chunk of the decoder.
        missing: how many layers are left out.
    """

    def __init__(self, memory: LiveMemory, operators: Operators, layers: Sequence[nn.Module], missing: int):
        self._memory, self._operators, self._missing, self._present = memory, operators, missing, len(layers)
        self._repeated = layers[-min(2, len(layers))]
        self._waiting: list[Counter[str]] = []  # what the missing layers keep, for each forward pass under way
        self._remembers = False
        self._begun: Counter[tuple[Place, Call]] | None = None  # the operators before a pass of the repeated layer
        if missing > 0:
            before, repeated, last = layers[-3:]
            repeated.register_forward_pre_hook(lambda *_: self._again() if in_backward() else self._begin())
            last.register_forward_pre_hook(lambda *_: None if in_backward() else self._end())
            before.register_forward_pre_hook(lambda *_: self._count() if in_backward() else None)
            _when_backward_begins(repeated, self._again)
            _when_backward_begins(before, self._count)

    def add_remembered(self, left: Mapping[str, int], features: Tensor | None) -> None:
        """Counts what the dispatcher of each missing layer remembers of the last micro-batch, from the first one on.

        Args:
            left: what the first micro-batch has left behind in the layers that are there, bytes by phase.
            features: its features, whose gradient is among that.
        """
        has_dispatcher = any(getattr(module, "token_dispatcher", None) for module in self._repeated.modules())
        if has_dispatcher and not self._remembers:
            self._remembers = True
            gradient = (
                features.grad.untyped_storage().nbytes() if features is not None and features.grad is not None else 0
            )
            size = (left.get("decoder", 0) - gradient) // self._present
            self._memory.add({"decoder": size}, max(self._missing, 0))

    def _begin(self) -> None:
        self._start, self._begun = Counter(self._memory.by_phase), self._operators.found.copy()

    def _end(self) -> None:
        kept = Counter(self._memory.by_phase)
        kept.subtract(self._start)
        self._count()
        self._waiting.append(kept)  # nothing, if what is kept is in host memory; the backward pass comes all the same
        self._memory.add(kept, self._missing)

    def _again(self) -> None:
        """The backward pass of the repeated layer begins, so those of the layers that it stands for are done."""
        if self._waiting:
            self._memory.add(self._waiting.pop(), -self._missing)
            self._begun = self._operators.found.copy()

    def _count(self) -> None:
        """Counts the operators since a pass of the repeated layer began once more for each layer that it stands for."""
        if self._begun is not None:
            since = self._operators.found - self._begun
            for key, count in since.items():
                self._operators.found[key] += count * self._missing
            self._begun = None


def stand_in(
    memory: LiveMemory, operators: Operators, vlm: VLM, shapes: Shapes, parallel: ParallelSettings, stage: int
) -> list[StandIns]:
    """Counts what ``vlm``, built with ``fewer_layers``, lacks of a model with these ``shapes`` on a pipeline stage.

    Returns:
        What counts the layers of each chunk of the decoder.
    """
    StandIns(memory, operators, vlm.vision.layers, shapes.vision.layers - len(vlm.vision.layers))
    found = []
    for chunk in vlm.language:
        layers = chunk.decoder.layers
        missing = layers_of(parallel, shapes.text.layers, stage) - len(layers)
        found.append(StandIns(memory, operators, layers, missing))
    return found


def _when_backward_begins(layer: nn.Module, call: Callable[[], None]) -> None:
    """Calls ``call`` when the gradient of the layer's output is known."""

    def after(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        if not in_backward() and output[0].requires_grad:
            output[0].register_hook(lambda gradient: call())

    layer.register_forward_hook(after)
