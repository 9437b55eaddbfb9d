"""Pixels as bytes and their normalisation on the device, against transformers' processor, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.renderer import Renderer
from megavlm.media.files import in_folder
from megavlm.runtime.pixels import normalised


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder with three noisy pictures, in which all 256 values occur."""
    root, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(3)
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (96, 160, 3), dtype=np.uint8)).save(root / f"{number}.png")
    return root


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_pixels", [96 * 160, 64 * 96])  # as they are; resized
def test_normalised_pixels_are_those_of_transformers(model_folder, noise, dtype, max_pixels):
    renderer = Renderer(model_folder, DataSettings(max_pixels=max_pixels, min_pixels=1024))
    record = {"text": "<image> and <video>", "images": ["0.png"], "videos": [{"frames": ["0.png", "1.png", "2.png"]}]}
    sample = renderer.encode(record, in_folder(noise), "a record", kind="pretrain")
    pictures = [Image.open(noise / f"{number}.png") for number in range(3)]
    processor = AutoProcessor.from_pretrained(model_folder)
    limits = {"shortest_edge": 1024, "longest_edge": max_pixels}
    still = processor.image_processor(images=[pictures[0]], size=limits, return_tensors="pt")
    frames = np.stack([np.asarray(picture) for picture in pictures])
    clip = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert sample.frame_images.tolist() == [1, 2, 2]  # the last step of the video has its last frame twice
    lengths = sample.frame_grids.prod(dim=1).numpy()
    made = normalised(sample.pixels, lengths, sample.frame_images.numpy(), sample.pixel_scale, 2, dtype)
    expected = torch.cat([still["pixel_values"], clip["pixel_values_videos"]])
    assert made.dtype == dtype
    assert torch.equal(made, expected.to(dtype))
    assert expected[:, :256].unique().numel() == 256 or max_pixels < 96 * 160
    # a picture alone takes an eighth of the bytes of float32 patches
    assert 8 * sample.pixels[: lengths[0]].nbytes == still["pixel_values"].nbytes


def test_many_patches_are_normalised_in_pieces(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    lengths, images = np.array([7, 4, 9]), np.array([2, 1, 2])
    pixels = torch.randint(0, 256, (7 * 2 + 4 + 9 * 2, 12), dtype=torch.uint8, generator=draw)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    whole = normalised(pixels, lengths, images, scale, 2, torch.float32)
    monkeypatch.setattr("megavlm.runtime.pixels._AT_ONCE", 3)
    assert torch.equal(normalised(pixels, lengths, images, scale, 2, torch.float32), whole)
    # patch 2 of the last frame: rows 14 + 4 + 2 and 9 rows further on; channel 1 has its values 4 … 7
    patch = whole[7 + 4 + 2].view(3, 2, 4)
    assert torch.equal(patch[1, 0], (pixels[20, 4:8].float() - 2.0) / 5.0)
    assert torch.equal(patch[1, 1], (pixels[29, 4:8].float() - 2.0) / 5.0)


def test_a_folder_that_normalises_otherwise_is_refused(model_folder, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    for file in other.glob("*processor*.json"):
        content = json.loads(file.read_text())
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if "image_mean" in part:
                part["do_normalize"] = False
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not normalise"):
        Renderer(other, DataSettings())
