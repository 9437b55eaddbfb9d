"""The parallel layouts of a number of GPUs: those that fit the model, and why the others do not."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.plan.gpus import Gpu
from megavlm.plan.plan import INTERLEAVED
from megavlm.runtime.session import check_shapes

MOST_BUBBLE = 0.5
"""Largest share of a step in which a stage may wait for others, by the schedule alone."""
WINDOW = 16
"""Micro-batches of a window for each pipeline stage: the pipeline fills and empties once in a window."""
_CHUNKS = (None, *INTERLEAVED)  # of a stage


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with other values of these dotted names. Raises UserError if they contradict each other."""
    tree = settings.model_dump(exclude_unset=True, by_alias=True)
    for name, value in changes.items():
        *sections, key = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        causes = [details.get("ctx", {}).get("error") for details in error.errors()]
        problem = next((cause for cause in causes if isinstance(cause, UserError)), None)
        raise problem or UserError(str(error), "change the settings") from None


def layouts(settings: Settings, shapes: Shapes, gpus: int, gpu: Gpu) -> Iterator[tuple[dict[str, Any], str | None]]:
    """All layouts of this many GPUs: settings by dotted name, and why it is ruled out, or None."""
    for sizes in _sizes(shapes, gpus):
        changes = {f"parallel.{name}": value for name, value in sizes.items()}
        if sizes["tensor"] > gpu.nvlink_domain:
            yield changes, f"tensor parallelism beyond the {gpu.nvlink_domain} GPUs that NVLink connects"
            continue
        try:
            parallel = settings.parallel.model_copy(update=sizes)
            data_parallel = check_shapes(settings.model_copy(update={"parallel": parallel}), shapes, gpus)
            own = with_changes(settings, changes)  # takes longer, so it comes after what rules most layouts out
        except UserError as error:
            yield changes, _reason(error)
            continue
        if (missing := _least_bytes(own, shapes) - gpu.memory_gib * 2**30) > 0:
            yield changes, f"needs {missing / 2**30:.1f} GiB more for weights and gradients of layers alone"
            continue
        rows, stages = own.rows_per_step(data_parallel), sizes["pipeline"]
        waiting = (stages - 1) / (stages - 1 + rows * (sizes["virtual_pipeline"] or 1))
        changes |= {"vision.window": _window(settings, rows, stages)}
        yield changes, f"bubble above {MOST_BUBBLE:.0%} of a step" if waiting > MOST_BUBBLE else None


def _window(settings: Settings, rows: int, stages: int) -> int | None:
    """The window of the configuration; otherwise one of so many rows that a pipeline seldom waits, if it saves much."""
    window = WINDOW * stages
    return window if settings.vision.window is None and stages > 1 and rows > window else settings.vision.window


def _least_bytes(settings: Settings, shapes: Shapes) -> float:
    """Fewer bytes than weights and gradients of the decoder's layers take on a GPU, to rule layouts out in no time."""
    text, parallel = shapes.text, settings.parallel
    if settings.adapter.type is not None or "language" in settings.frozen():
        return 0.0
    attention = text.hidden * text.head_dim * 2 * (text.heads + text.kv_heads) / parallel.tensor
    total = 0.0
    for layer in range(text.layers):
        if text.moe is not None and text.is_moe_layer(layer):
            mlp = text.moe.num_experts * text.moe.ffn / (parallel.expert * parallel.expert_tensor)
        else:
            mlp = text.ffn / parallel.tensor
        total += attention + 3 * text.hidden * mlp
    each = 8 if settings.train.precision == "fp32" else 6  # a weight, and its gradient in float32
    return each * total / parallel.pipeline


def _sizes(shapes: Shapes, gpus: int) -> Iterator[dict[str, Any]]:
    moe, layers = shapes.text.moe, shapes.text.layers
    for tensor, pipeline, context in itertools.product(_divisors(gpus), repeat=3):
        if gpus % (tensor * pipeline * context) or pipeline > layers:
            continue
        experts = [n for n in _divisors(gpus // pipeline) if n <= moe.num_experts] if moe is not None else [1]
        slices = sorted({1, tensor}) if moe is not None else [1]
        for expert, expert_tensor, chunks in itertools.product(experts, slices, _CHUNKS):
            if gpus % (expert * expert_tensor * pipeline) or (chunks and (pipeline == 1 or pipeline * chunks > layers)):
                continue
            first, last = _uneven(layers, pipeline, chunks or 1)
            yield {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": chunks,
                "first_stage_layers": first,
                "last_stage_layers": last,
                "context": context,
                "expert": expert,
                "expert_tensor": expert_tensor,
            }


def _uneven(layers: int, pipeline: int, chunks: int) -> tuple[int | None, int | None]:
    """The layers of the first and of the last stage: fewer than of the others if all cannot have the same number.

    The last one has no more than the first, because it has the head, too. None, None if there is no way.
    """
    if layers % (pipeline * chunks) == 0 or layers % chunks:
        return None, None
    units = layers // chunks  # each stage has a multiple of ``chunks`` layers
    if pipeline == 2:
        return None, units // 2 * chunks or None
    middle = -(-units // pipeline)
    ends = units - middle * (pipeline - 2)
    if ends < 2:
        return None, None
    return (ends + 1) // 2 * chunks, ends // 2 * chunks


def _reason(error: UserError) -> str:
    """What was wrong, without the numbers of one layout, so that it can be counted."""
    for words, reason in _REASONS.items():
        if words in error.message:
            return reason
    return error.message


_REASONS = {
    "attention heads": "attention heads not divisible",
    "key/value heads": "key/value heads not divisible",
    "vocabulary entries": "vocabulary not divisible",
    "columns of an": "columns of MLPs or experts not divisible",
    "layers": "layers not divisible",
    "data.seq_length": "row length not divisible",
    "data-parallel ranks": "batch not divisible",
    "data-parallel rank": "batch not divisible",
    "vision.window": "window not divisible",
    "experts": "experts not divisible",
    "pad_multiple": "row length not divisible",
    "cannot hold the layout": "number of GPUs not divisible",
}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
