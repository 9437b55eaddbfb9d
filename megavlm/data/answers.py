"""Samples of prompts and of answers that were sampled to them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megavlm.data.row import IGNORE, NO_ANNOTATIONS, Annotations, Row, Sample


def first_sample(row: Row) -> Sample:
    """Returns the sample of a row that contains only one, without its padding."""
    assert row.num_samples == 1, "the row has one sample"
    length = row.sample_lengths[0]
    return Sample(
        input_ids=row.input_ids[:length],
        labels=row.labels[:length],
        loss_weights=row.loss_weights[:length],
        position_ids=row.position_ids[:, :length],
        pixels=row.pixels,
        frame_images=row.frame_images,
        frame_grids=row.frame_grids,
        visual_positions=row.visual_positions,
        num_images=row.num_images,
        num_videos=row.num_videos,
        source=row.sources[0],
        index=row.indices[0],
        source_id=row.source_ids[0],
        annotations=row.annotations[0],
        remarks=tuple(row.remarks),
        pixel_scale=row.pixel_scale,
    )


def with_answer(
    prompt: Sample, tokens: list[int], annotations: Annotations, *, is_target: bool = True, shares_media: bool = False
) -> Sample:
    """Returns a prompt of p tokens followed by an answer, whose tokens are the targets.

    Args:
        prompt: the prompt.
        tokens: the n tokens of the answer, which contain no placeholder of a picture or video.
        annotations: inputs of the loss.
        is_target: whether the answer is learned from.
        shares_media: see ``Sample``.
    """
    answer, first = torch.tensor(tokens, dtype=torch.int64), len(prompt.input_ids)
    input_ids = torch.cat([prompt.input_ids, answer])
    labels = torch.full_like(input_ids, IGNORE)
    if is_target:
        labels[first - 1 : -1] = answer  # the label of a position is the token that follows it
    # The three positions of a new token are one more than the largest position before it.
    after = int(prompt.position_ids.max()) + 1
    positions = torch.arange(after, after + len(tokens)).expand(3, -1)
    return Sample(
        input_ids=input_ids,
        labels=labels,
        loss_weights=(labels != IGNORE).float(),
        position_ids=torch.cat([prompt.position_ids, positions], dim=1),
        pixels=prompt.pixels[:0] if shares_media else prompt.pixels,
        frame_images=prompt.frame_images,
        frame_grids=prompt.frame_grids,
        visual_positions=prompt.visual_positions,
        num_images=prompt.num_images,
        num_videos=prompt.num_videos,
        source=prompt.source,
        index=prompt.index,
        source_id=prompt.source_id,
        shares_media=shares_media,
        annotations=annotations,
        remarks=() if shares_media else prompt.remarks,
        pixel_scale=prompt.pixel_scale,
    )


def with_targets(
    conversation: Sample,
    said: Sequence[bool],
    annotations: Annotations,
    *,
    is_target: bool = True,
    shares_media: bool = False,
) -> Sample:
    """Returns a conversation whose targets are those of its last tokens that the model has said.

    Args:
        conversation: a prompt, and all that followed.
        said: of each of the n tokens that followed, whether the model has said it.
        annotations: inputs of the loss.
        is_target: whether the conversation is learned from.
        shares_media: see ``Sample``.
    """
    tokens, first = conversation.input_ids, len(conversation.input_ids) - len(said)
    labels = torch.full_like(tokens, IGNORE)
    if is_target:
        labels[first - 1 : -1] = torch.where(torch.tensor(said, dtype=torch.bool), tokens[first:], IGNORE)
    return replace(
        conversation,
        labels=labels,
        loss_weights=(labels != IGNORE).float(),
        pixels=conversation.pixels[:0] if shares_media else conversation.pixels,
        shares_media=shares_media,
        annotations=annotations,
        remarks=() if shares_media else conversation.remarks,
    )


def followed_by(first: Sample, second: Sample) -> Sample:
    """Returns a sample without targets: the tokens, pictures and videos of the first, then those of the second.

    The positions of the second go on after those of the first, as in a conversation that was rendered as a whole.
    Everything else is that of the first.
    """
    has_media = len(second.frame_grids) > 0  # without any, the pixels are not copied
    joined = lambda name: torch.cat([getattr(first, name), getattr(second, name)])
    of_media = lambda name: joined(name) if has_media else getattr(first, name)
    tokens = joined("input_ids")
    after = int(first.position_ids.max()) + 1
    return replace(
        first,
        input_ids=tokens,
        labels=torch.full_like(tokens, IGNORE),
        loss_weights=torch.zeros(len(tokens)),
        position_ids=torch.cat([first.position_ids, second.position_ids + after], dim=1),
        pixels=of_media("pixels"),
        frame_images=of_media("frame_images"),
        frame_grids=of_media("frame_grids"),
        visual_positions=torch.cat([first.visual_positions, second.visual_positions + len(first.input_ids)]),
        num_images=first.num_images + second.num_images,
        num_videos=first.num_videos + second.num_videos,
    )


def without_end(sample: Sample, count: int) -> Sample:
    """Returns a sample without its last ``count`` tokens, which are text and no targets."""
    kept = len(sample.input_ids) - count
    return replace(
        sample,
        input_ids=sample.input_ids[:kept],
        labels=sample.labels[:kept],
        loss_weights=sample.loss_weights[:kept],
        position_ids=sample.position_ids[:, :kept],
    )


def continued(sample: Sample, tokens: list[int]) -> Sample:
    """Returns a sample without targets, followed by tokens of text."""
    return with_answer(sample, tokens, NO_ANNOTATIONS, is_target=False)
