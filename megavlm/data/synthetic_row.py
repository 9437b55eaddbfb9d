"""Synthetic samples that are not read from data, for the longest row of the memory check and the row of a dry run."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megavlm.data.positions import mrope_positions
from megavlm.data.row import IGNORE, Annotations, Sample, SampledAnswer


def synthetic_samples(
    tokens: Tensor, pixels: Tensor, frame_grids: np.ndarray, visual_positions: np.ndarray, *, merge: int, answers: int
) -> list[Sample]:
    """Samples for any method: all positions except the last have a target, and all annotations have a value.

    Args:
        tokens: int64 [t], the token ids of each sample.
        pixels: uint8 [P, channels * patch * patch], the pixels of its pictures, one frame each.
        frame_grids: int32 [F, 2], patches (h, w) of each frame; the products sum to P.
        visual_positions: int64 [P / merge**2], index in ``tokens`` of each visual token.
        merge: patches per side that are merged into one visual token.
        answers: 1 for a single sample; 2 for two answers to the same prompt that share its pictures, which preference
            methods need.
    """
    is_target = torch.arange(len(tokens)) < len(tokens) - 1
    sampled = SampledAnswer(advantage=1.0, logprobs=torch.zeros(len(tokens) - 1), number=0)
    sample = Sample(
        input_ids=tokens,
        labels=torch.where(is_target, tokens.roll(-1), IGNORE),
        loss_weights=is_target.float(),
        position_ids=torch.from_numpy(mrope_positions(len(tokens), frame_grids, visual_positions, merge)),
        pixels=pixels,
        frame_images=torch.ones(len(frame_grids), dtype=torch.int32),
        frame_grids=torch.from_numpy(frame_grids),
        visual_positions=torch.from_numpy(visual_positions),
        num_images=len(frame_grids),
        num_videos=0,
        source="synthetic",
        index=0,
        annotations=Annotations(side="chosen", margin=0.0, desirable=True, ref_logprob=0.0, sampled=sampled),
    )
    if answers == 1:
        return [sample]
    further = Annotations(side="rejected", mismatched=True, ref_logprob=0.0, sampled=sampled)
    return [sample, replace(sample, shares_media=True, pixels=pixels[:0], annotations=further)]
