"""Runs micro-batches through the tower and this rank's part of the decoder, outside a training step."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavlm.model.language import LanguageModel
from megavlm.model.tower_phase import Timer
from megavlm.model.vlm import VLM
from megavlm.platform import device
from megavlm.runtime.feed import MicroBatch, Window


def encode_window(vlm: VLM, window: Window, timer: Timer = nullcontext) -> None:
    """Encodes the frames of a window and sets the features of its micro-batches (``timer``: see ``TowerPhase``)."""
    frames, window.frames = window.frames, None  # the tower keeps what it needs of them
    assert frames is not None, "a window is encoded once"
    encoded = vlm.tower.encode(frames, window.exchange, timer)
    for micro_batch, (positions, features) in zip(window.micro_batches, encoded, strict=True):
        micro_batch.row.visual_positions = positions
        micro_batch.features = features


def feature_planes(vlm: VLM, chunk: LanguageModel, micro_batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
    """Returns the features of a micro-batch that a chunk uses: embeddings [n, hidden], deepstack [levels, n, hidden].

    Either is None if the chunk does not use it.
    """
    if micro_batch.features is None:
        return None, None
    planes, visual, deepstack = vlm.tower.share.planes, None, None
    move = lambda planes: planes.to(device(), non_blocking=True)  # with vision.offload, they are in host memory
    if chunk.pre_process:
        visual = move(micro_batch.features[planes.index(0)])
    levels = vlm.chunk_levels(vlm.groups.language.pp.rank(), chunk.vp_stage)
    if levels:
        first = planes.index(1 + levels[0])
        deepstack = move(micro_batch.features[first : first + len(levels)])
    return visual, deepstack


def forward_chunk(vlm: VLM, chunk: LanguageModel, micro_batch: MicroBatch) -> Tensor:
    """Returns the hidden states [t, 1, hidden] of one decoder chunk.

    The hidden states of the previous pipeline stage arrive through Megatron (``set_input_tensor``).
    """
    visual, deepstack = feature_planes(vlm, chunk, micro_batch)
    return chunk(
        micro_batch.input_ids,
        micro_batch.position_ids,
        micro_batch.row,
        visual=visual,
        deepstack=deepstack,
        padding_mask=micro_batch.padding_mask,
    )


def prepare_schedule(config: TransformerConfig) -> None:
    """Sets the entries of the decoder's TransformerConfig that Megatron's schedules read."""
    config.finalize_model_grads_func = lambda *args, **kwargs: None  # the tower's backward pass comes later
    config.deallocate_pipeline_outputs = False
    config.variable_seq_lengths = False
    config.moe_grad_scale_func = lambda: torch.ones((), device=device())  # a training step sets another one


@torch.no_grad()
def forward_only(vlm: VLM, window: Window, read: Callable[[LanguageModel, Tensor, MicroBatch], Tensor]) -> list[Tensor]:
    """Runs the model on a window without gradients.

    Args:
        vlm: the model.
        window: the window; its frames are encoded first.
        read: computes a tensor from the last chunk, the hidden states [t, 1, hidden] and the micro-batch.

    Returns:
        On the ranks of the last pipeline stage, the result of ``read`` for each micro-batch; [] on the other ranks.
    """
    encode_window(vlm, window)
    prepare_schedule(vlm.decoder_config)

    def forward_step(micro_batches: Iterator[MicroBatch], model: LanguageModel) -> tuple[Tensor, Callable | None]:
        micro_batch = next(micro_batches)
        hidden = forward_chunk(vlm, model, micro_batch)
        if not model.post_process:
            return hidden, None
        return read(model, hidden, micro_batch), lambda output: (output.new_zeros(()), output)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(window.micro_batches) for _ in vlm.language],
        model=vlm.language,
        num_microbatches=len(window.micro_batches),
        seq_length=len(window.micro_batches[0].host.input_ids),
        micro_batch_size=1,
        forward_only=True,
    )


@torch.no_grad()
def logprobs_of(vlm: VLM, micro_batch: MicroBatch, chunk_tokens: int) -> Tensor:
    """Returns the log-probability of each target of a row, and 0 at other positions: float32 [T] on the host.

    It requires a layout with one pipeline stage.
    """
    hidden = forward_chunk(vlm, vlm.language[0], micro_batch)
    logprobs, _ = vlm.language[0].token_logprobs(hidden, micro_batch.targets, chunk_tokens)
    row_index = micro_batch.targets.row_index
    row = torch.zeros(len(micro_batch.host.labels))
    row[row_index[row_index >= 0]] = logprobs.cpu()[row_index >= 0]
    if vlm.parallel.context > 1:  # each context-parallel rank has only the targets of its part of the row
        row = row.to(device())
        dist.all_reduce(row, group=vlm.groups.language.cp)
    return row.cpu()


@torch.no_grad()
def scores_of(vlm: VLM, micro_batch: MicroBatch) -> Tensor:
    """Returns the reward head's score at the last target of each sample: float32 [samples] on the host.

    It requires a layout with one pipeline stage.
    """
    hidden = forward_chunk(vlm, vlm.language[0], micro_batch)
    scores = vlm.language[0].scores(hidden, micro_batch.last_targets)
    groups = vlm.groups.language
    for group in (groups.cp, *([groups.tp] if vlm.parallel.sequence_parallel else [])):
        dist.all_reduce(scores, group=group)
    return scores.cpu()
