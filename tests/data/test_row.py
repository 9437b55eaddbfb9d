"""Packing samples into a row."""

import copy

import pytest
import torch

from megavlm.data.row import IGNORE


@pytest.fixture
def samples(renderer, media):
    records = [
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "bc"}]},
        {"messages": [{"role": "user", "content": "<image><video>?"}, {"role": "assistant", "content": "def"}]},
    ]
    records[0]["images"] = ["wide.png"]
    records[2] |= {"images": ["grey.png"], "videos": ["clip.mp4"]}
    return [
        renderer.encode(record, media.find, f"f:{number + 1}", kind="tune", index=number)
        for number, record in enumerate(records)
    ]


def test_row_holds_the_samples_one_after_another(renderer, samples):
    lengths = [len(sample.input_ids) for sample in samples]
    row = renderer.pack(samples, 2048)
    assert row.num_tokens == sum(lengths)
    assert row.segment_lengths == [*lengths, 2048 - sum(lengths)]
    assert (row.num_samples, row.num_images, row.num_videos) == (3, 2, 1)
    assert (row.sources, row.indices) == (["f:1", "f:2", "f:3"], [0, 1, 2])
    assert sum(row.frame_lengths) == 4 * len(row.visual_positions)
    assert len(row.pixels) == sum(n * k for n, k in zip(row.frame_lengths, row.frame_images.tolist(), strict=True))
    assert set(row.frame_images.tolist()) == {1, 2}  # pictures and a video
    assert row.num_targets == sum((sample.labels != IGNORE).sum() for sample in samples)

    for sample, start, end in zip(samples, row.cu_seqlens[:3], row.cu_seqlens[1:], strict=False):
        torch.testing.assert_close(row.input_ids[start:end], sample.input_ids)
        torch.testing.assert_close(row.labels[start:end], sample.labels)
        torch.testing.assert_close(row.loss_weights[start:end], sample.loss_weights)
        torch.testing.assert_close(row.position_ids[:, start:end], sample.position_ids)
    assert torch.equal(row.pixels, torch.cat([sample.pixels for sample in samples]))
    visual_ids = torch.tensor([renderer.processor.image_token_id, renderer.processor.video_token_id])
    torch.testing.assert_close(row.visual_positions, torch.isin(row.input_ids, visual_ids).nonzero()[:, 0])

    padding = slice(row.num_tokens, None)
    assert (row.input_ids[padding] == renderer.pad_id).all()
    assert (row.labels[padding] == IGNORE).all()
    assert not row.loss_weights[padding].any()
    assert not row.position_ids[:, padding].any()


def test_aligned_samples(renderer, samples):
    lengths = [len(sample.input_ids) for sample in samples]
    aligning = copy.copy(renderer)
    aligning.pad_multiple = 16
    row, plain = aligning.pack(samples, 2048), renderer.pack(samples, 2048)
    padded = [-(-length // 16) * 16 for length in lengths]
    assert any(a != b for a, b in zip(padded, lengths, strict=True))
    assert row.segment_lengths == [*padded, 2048 - sum(padded)]
    assert (row.num_tokens, row.num_targets, row.sample_lengths) == (sum(lengths), plain.num_targets, lengths)
    real = ~row.is_padding()
    assert int(real.sum()) == row.num_tokens
    for name in ("input_ids", "labels", "loss_weights", "position_ids"):
        torch.testing.assert_close(getattr(row, name)[..., real], getattr(plain, name)[..., ~plain.is_padding()])
    assert not row.loss_weights[~real].any()
    torch.testing.assert_close(row.input_ids[row.visual_positions], plain.input_ids[plain.visual_positions])


def test_patch_positions_do_not_depend_on_the_neighbours(renderer, samples):
    row = renderer.pack(samples, 2048)
    alone = [renderer.pack([sample], 2048) for sample in samples]
    for name in ("patch_coords", "pos_index", "pos_weight", "frame_grids", "frame_images"):
        torch.testing.assert_close(getattr(row, name), torch.cat([getattr(one, name) for one in alone]))
    torch.testing.assert_close(row.pos_weight.sum(1), torch.ones(sum(row.frame_lengths)))


def test_full_row_has_no_padding_segment(renderer, samples):
    length = len(samples[1].input_ids)
    row = renderer.pack([samples[1]], length)
    assert row.segment_lengths == [length]
    assert row.pixels.shape == (0, 768)
    assert row.frame_lengths == []
