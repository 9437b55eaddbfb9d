"""The memory check before the first step: it tests whether the longest row that the settings allow fits in memory.

Without it, a run might fail at its first long row, after hours. All ranks run the row like any other row through the
feed, the tower, the decoder and the reduction of gradients. Nothing is updated, and the results of the training do not
change.
"""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.checkpoint.manager import random_state, set_random_state
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.synthetic_row import synthetic_samples
from megavlm.optim.galore import GaLore
from megavlm.optim.muon import Muon
from megavlm.optim.stored_adam import state_bytes
from megavlm.platform import device, memory_gib, reset_memory
from megavlm.records.records import Kind
from megavlm.runtime.feed import Feed
from megavlm.training.step import Step

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
_BLOCK = 4096  # number of random patches; further patches repeat them


def check_memory(steps: Sequence[Step], longest_row: Callable[[], Row] | None, settings: Settings) -> str:
    """Runs the longest row forward and backward on all ranks, through each model that is trained.

    Afterwards the state is as before.

    Args:
        steps: the step of each model, that of the main model first; their feeds are not read.
        longest_row: makes the longest row, on leaders; None on the other ranks.
        settings: the settings of the run.

    Returns:
        A message with the time and the peak memory, for the terminal; "" on ranks that are not leaders.

    Raises:
        UserError: this rank ran out of memory. The message names settings that help. The other ranks keep waiting.
    """
    began, step = time.perf_counter(), steps[0]
    num_rows = min(step.num_micro_batches, step.window)  # the number of rows whose features exist at the same time
    with _same_random_numbers():
        try:
            rows = [longest_row()] * num_rows if longest_row is not None else None
            # A model that waits in host memory takes none on the device while the others learn.
            reserved = [_optimizer_state_to_come(one) for one in steps if one.awake is contextlib.nullcontext]
            for one in steps:
                with one.awake(), _unfrozen(one):
                    own = _optimizer_state_to_come(one) if one.awake is not contextlib.nullcontext else None
                    one.gradients(one.rows(Feed(one.vlm, iter(rows) if rows is not None else None), num_rows))
                    del own
            peak = _largest(memory_gib(), step)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise _too_large(error, settings) from None
    del reserved
    for one in steps:
        with one.awake():
            one.optimizers.zero_grad()
    reset_memory()
    if rows is None:
        return ""  # only rank 0 prints the message, and it is a leader
    visual = len(rows[0].visual_positions)
    return (
        f"memory check: {num_rows} × {settings.data.seq_length} tokens, {visual} of them visual, "
        f"{time.perf_counter() - began:.1f} s, peak {peak[0]:.3g} GiB on rank {peak[1]}"
    )


def longest_row(renderer: Renderer, kind: Kind = "tune") -> Row:
    """Makes a row of one sample with exactly ``data.seq_length`` tokens and as many pictures as fit.

    The pictures are as large as the settings allow. For the kinds "pair" and "judged", the row has two answers of half
    the length, which share the pictures. Every token except the last has a target. Pixels and text are random numbers
    from a separate generator, because equal tokens would all be routed to the same experts.
    """
    vision, draw = renderer.vision, np.random.default_rng(0)
    pixels_of_token = vision.hf.image_processor.patch_size**2 * vision.merge**2
    limits = vision.hf.image_processor.size
    least, most = (limits[edge] // pixels_of_token for edge in ("shortest_edge", "longest_edge"))
    answers = 2 if kind in ("pair", "judged") else 1
    length = renderer.seq_length // answers // renderer.pad_multiple * renderer.pad_multiple
    tokens = draw.integers(0, min(renderer.tokenizer.vocab_size, renderer.processor.image_token_id), length)
    grids, positions, used = [], [np.empty(0, np.int64)], 0
    while (room := min(length - used - 2, most)) >= max(least, 1):  # one text token before and after a picture
        height = math.isqrt(room)
        width = room // height
        grids.append((height * vision.merge, width * vision.merge))
        positions.append(np.arange(used + 1, used + 1 + height * width))
        used += height * width + 2
    frame_grids = np.array(grids, dtype=np.int32).reshape(-1, 2)
    visual = np.concatenate(positions)
    tokens[visual] = renderer.processor.image_token_id
    num_patches = int(frame_grids.prod(axis=1).sum())
    block = torch.from_numpy(draw.integers(0, 256, (min(_BLOCK, num_patches), vision.pixel_width), dtype=np.uint8))
    samples = synthetic_samples(
        torch.from_numpy(tokens.astype(np.int64)),
        block[torch.arange(num_patches) % max(len(block), 1)],
        frame_grids,
        visual,
        merge=vision.merge,
        answers=answers,
    )
    return renderer.pack(samples)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, numpy or one of their libraries could not allocate memory on the device or the host."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in words for word in _MEMORY_WORDS)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restores the state of all random number generators at the end of the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _to_unfreeze(step: Step) -> list[torch.nn.Parameter]:
    """Returns the weights on this rank that are frozen now and will be unfrozen later."""
    parts = [part for part in step.optimizers.train.unfreeze_after if part not in step.optimizers.unfrozen_at]
    return [p for part in parts for module in step.vlm.modules_of(part) for p in module.parameters()]


@contextlib.contextmanager
def _unfrozen(step: Step) -> Iterator[None]:
    """Unfreezes all parts within the block that are unfrozen later, so that the peak includes their training."""
    weights, in_buffer = _to_unfreeze(step), step.vlm.kernels == "te"
    for weight in weights:
        weight.requires_grad_(True)
        if in_buffer:  # Transformer Engine's layers add to it
            weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]  # Megatron's
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False).grad = None
            if in_buffer:
                del weight.main_grad  # type: ignore[attr-defined]  # Megatron's


def _optimizer_state_to_come(step: Step) -> torch.Tensor | None:
    """Allocates as much memory as the optimizers will allocate later.

    In its first step, Adam allocates two float32 numbers for each number that this rank updates, unless its state is
    there already (``optim/stored_adam.py``). GaLore and Muon allocate their state in this function. A part that is
    unfrozen later needs a gradient buffer, less the gradients that exist during the memory check, a float32 copy of
    half-precision weights and, with ``train.ema``, their averages. Of memory that is divided among data-parallel ranks,
    only this rank's part is counted (experts, which are divided among fewer ranks, are counted like other weights).
    """
    optimizers, groups, numbers = step.optimizers, step.groups, 0.0
    train, adam = optimizers.train, optimizers.train.optimizer == "adam"
    if adam and not any(o.optimizer.state for o in optimizers.optimizer.chained_optimizers):
        numbers = 2 * sum(p.numel() for group in optimizers.optimizer.param_groups for p in group["params"])
    inner = [o.optimizer for o in optimizers.optimizer.chained_optimizers if isinstance(o.optimizer, GaLore | Muon)]
    for optimizer in inner:
        optimizer.fill()
    tower = {p for part in ("vision", "projector") for m in step.vlm.modules_of(part) for p in m.parameters()}
    for weight in _to_unfreeze(step):
        share = (groups.tower if weight in tower else groups.language).dp_cp.size() if adam else 1
        half = weight.element_size() < 4
        state = half + adam * (state_bytes(train) - 4) / 4 + (train.ema is not None)
        numbers += weight.numel() * (half / 2 + (0 if train.offload_optimizer else state) / share)
        if inner:
            numbers += sum(math.prod(shape) for shape in inner[0].state_shapes(weight).values())
    # the memory is written to, because a CPU would not allocate it otherwise
    return torch.ones(round(numbers), dtype=torch.float32, device=device()) if numbers else None


def _largest(memory: float, step: Step) -> tuple[float, int]:
    """Returns the largest peak of all ranks in GiB, and the rank that has it."""
    group = step.groups.world_host
    peaks = [torch.empty(1, dtype=torch.float64) for _ in range(group.size())]
    dist.all_gather(peaks, torch.tensor([memory], dtype=torch.float64), group=group)
    return max((peak.item(), rank) for rank, peak in enumerate(peaks))


def _too_large(error: Exception, settings: Settings) -> UserError:
    train, vision = settings.train, settings.vision
    smallest = settings.parallel.pipeline  # number of rows that fill the pipeline
    tower_is_trained = not {"vision", "projector"} <= set(settings.model.freeze)
    advice = [
        *(["train.recompute=full"] if train.recompute != "full" else []),
        *(["vision.recompute=true"] if tower_is_trained and not vision.recompute else []),
        *([f"vision.window={smallest}"] if vision.window != smallest else []),
        *(["vision.offload=true"] if not vision.offload else []),
        *(["train.offload_activations=true"] if train.recompute == "full" and not train.offload_activations else []),
        *(["train.offload_optimizer=true"] if train.can_offload else []),
        "a larger parallel.tensor or parallel.context, on more processes",
        f"data.seq_length below {settings.data.seq_length}",
        *(
            [f"train.logprob_chunk_tokens below {train.logprob_chunk_tokens}"]
            if train.logprob_chunk_tokens > 64
            else []
        ),
    ]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"the longest possible row, of data.seq_length = {settings.data.seq_length} tokens, does not fit in memory: "
        f"rank {dist.get_rank()} on {socket.gethostname()} ran out of memory after a peak of {memory_gib():.3g} GiB "
        f"({reason})",
        f"try in this order: {'; '.join(advice)}. train.memory_check=false skips this check",
    )
