"""A model with few layers in the place of one with many: its last but one layer stands for all that are left out.

Layers of a kind keep the same number of bytes for the backward pass, each on top of those before it. What is alive is
therefore exact if the layers left out are counted as alive from the forward pass of the layer behind them until the
backward pass of the layer before them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megavlm.config.sections import ParallelSettings
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.plan.live_memory import LiveMemory

_PLAIN = 3  # layers that are kept beside those with deepstack features: one, the one that is repeated, and the last


def fewer_layers(settings: Settings, shapes: Shapes) -> tuple[Settings, Shapes]:
    """The settings and shapes with few layers in the tower and in each chunk of the decoder, if that can stand for all.

    It cannot if a chunk is short, or if some layers of the decoder have experts and others do not.
    """
    levels = len(shapes.vision.deepstack_layers)
    few = levels + _PLAIN
    if shapes.vision.layers > few:
        vision = replace(shapes.vision, layers=few, deepstack_layers=tuple(range(levels)))
        shapes = replace(shapes, vision=vision)
    parallel, text = settings.parallel, shapes.text
    shortest = min(layers_of(parallel, text.layers, stage) for stage in range(parallel.pipeline))
    if shortest > few and len({text.is_moe_layer(layer) for layer in range(text.layers)}) == 1:
        shapes = replace(shapes, text=replace(text, layers=few * parallel.pipeline * (parallel.virtual_pipeline or 1)))
        even = parallel.model_copy(update={"first_stage_layers": None, "last_stage_layers": None})
        settings = settings.model_copy(update={"parallel": even})
    return settings, shapes


def layers_of(parallel: ParallelSettings, layers: int, stage: int) -> int:
    """The number of layers in each chunk of a pipeline stage."""
    given = {0: parallel.first_stage_layers, parallel.pipeline - 1: parallel.last_stage_layers}
    uneven = [count for count in given.values() if count is not None]
    others = parallel.pipeline - len(uneven)
    count = given.get(stage) or (layers - sum(uneven)) // max(others, 1)
    return count // (parallel.virtual_pipeline or 1)


class StandIns:
    """Counts the layers that a model lacks, while a step runs.

    Args:
        memory: what counts.
        layers: the layers of the tower or of a chunk of the decoder.
        missing: how many layers are left out.
    """

    def __init__(self, memory: LiveMemory, layers: Sequence[nn.Module], missing: int):
        self._memory, self._missing = memory, missing
        self._waiting: list[Counter[str]] = []  # what the missing layers keep, for each forward pass under way
        if missing > 0:
            layers[-2].register_forward_pre_hook(self._before_repeated)
            layers[-2].register_forward_hook(self._after_repeated)
            layers[-1].register_forward_pre_hook(self._before_last)

    def _before_repeated(self, *_: Any) -> None:
        if _is_backward():  # the layer is recomputed, so those behind it are done
            self._release()
        else:
            self._start = Counter(self._memory.by_phase)

    def _after_repeated(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        if not _is_backward() and output[0].requires_grad:
            output[0].register_hook(lambda gradient: self._release())

    def _before_last(self, *_: Any) -> None:
        if _is_backward():
            return
        kept = Counter(self._memory.by_phase)
        kept.subtract(self._start)
        kept = Counter({phase: size for phase, size in kept.items() if size})
        if kept:
            self._waiting.append(kept)
            self._memory.add(kept, self._missing)

    def _release(self) -> None:
        if self._waiting:
            self._memory.add(self._waiting.pop(), -self._missing)


def stand_in(memory: LiveMemory, vlm: VLM, shapes: Shapes, parallel: ParallelSettings, stage: int) -> None:
    """Counts what ``vlm``, built with ``fewer_layers``, lacks of a model with these ``shapes`` on a pipeline stage."""
    StandIns(memory, vlm.vision.layers, shapes.vision.layers - len(vlm.vision.layers))
    for chunk in vlm.language:
        layers = chunk.decoder.layers
        StandIns(memory, layers, layers_of(parallel, shapes.text.layers, stage) - len(layers))


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
