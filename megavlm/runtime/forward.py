"""Runs micro-batches through the tower and this rank's part of the decoder, outside a training step."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavlm.model.language import LanguageModel
from megavlm.model.tower_phase import Timer
from megavlm.model.vlm import VLM
from megavlm.platform import device
from megavlm.platform.collectives import gather_objects
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
        window: the window; its frames are encoded first, unless they are already.
        read: computes a tensor from the last chunk, the hidden states [t, 1, hidden] and the micro-batch.

    Returns:
        On the ranks of the last pipeline stage, the result of ``read`` for each micro-batch; [] on the other ranks.
    """
    if window.frames is not None:
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


def to_leader(vlm: VLM, results: list[Tensor]) -> list[Tensor]:
    """Sends what ``forward_only`` has returned to the leader. Call it on all ranks.

    Args:
        vlm: the model.
        results: the results on this rank, the same on all ranks of the last pipeline stage.

    Returns:
        On the leader, the results in host memory; [] on the other ranks.
    """
    groups = vlm.groups
    is_first_of_stage = groups.language.tp.rank() == 0 and groups.language.cp.rank() == 0
    mine = [result.cpu() for result in results] if is_first_of_stage else []
    if vlm.parallel.pipeline == 1:
        return mine
    return list(itertools.chain.from_iterable(gather_objects(mine, groups.model_parallel_host)))
