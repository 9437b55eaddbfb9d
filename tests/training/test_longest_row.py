"""The longest row: exactly as long as a row is, and as heavy in pictures as the settings allow."""

import pytest
import torch
from toy import toy_folder

from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.training.memory_check import is_out_of_memory, longest_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("toy"))


def row_of(folder, **data):
    settings = Settings(model={"hf": folder}, data=data)
    return longest_row(Renderer(folder, settings.data)), settings


@pytest.mark.parametrize("length", [1, 3, 7, 64, 509, 4096])
def test_it_is_full(folder, length):
    row, _ = row_of(folder, seq_length=length, min_pixels=32 * 32, max_pixels=32 * 32 * 50)
    assert len(row.input_ids) == row.num_tokens == length
    assert row.segment_lengths == [length]
    assert row.num_targets == length - 1 == row.loss_weights.sum()
    tokens = [patches // 4 for patches in row.frame_lengths]
    assert max(tokens, default=0) <= 50
    assert len(row.visual_positions) == sum(tokens) == row.pixels.shape[0] // 4
    assert row.visual_positions.unique().numel() == sum(tokens)
    assert bool((row.input_ids[row.visual_positions] == row.input_ids[row.visual_positions][:1]).all())
    # Two tokens of text beside each picture; a picture may fall short of its room by less than its height.
    assert length - sum(tokens) <= 2 * len(tokens) + 8 * len(tokens) + 2
    if length >= 64:
        assert max(tokens) >= 49


def test_pictures_keep_to_the_smallest_size(folder):
    row, _ = row_of(folder, seq_length=100, min_pixels=32 * 32 * 30, max_pixels=32 * 32 * 60)
    assert row.num_images == 2  # 60 and 36 tokens with the text beside them, and nothing is left
    assert row.num_targets == 99
    assert all(patches // 4 >= 30 for patches in row.frame_lengths)
    row, _ = row_of(folder, seq_length=20, min_pixels=32 * 32 * 30, max_pixels=32 * 32 * 60)
    assert row.num_images == 0


def test_text_and_pixels_vary(folder):
    """Equal tokens would all go to the same experts."""
    row, _ = row_of(folder, seq_length=256, max_pixels=32 * 32 * 64)
    is_text = torch.ones(256, dtype=torch.bool)
    is_text[row.visual_positions] = False
    assert row.pixels.unique(dim=0).shape[0] == row.pixels.shape[0]
    row, _ = row_of(folder, seq_length=256, min_pixels=32 * 32 * 300, max_pixels=32 * 32 * 300)
    assert row.num_images == 0
    assert row.input_ids.unique().numel() > 100


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:  # torch's own words on this machine
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
