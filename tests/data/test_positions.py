"""Positions computed in the data workers against what transformers computes inside its forward."""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from megavlm.data.positions import grid_interpolation, mrope_positions, patch_coordinates

MERGE = 2
# What stands in a text, in order: a number of text tokens, or ("image" | "video", t, h, w).
LAYOUTS = {
    "text": [7],
    "picture": [3, ("image", 1, 4, 6), 5],
    "picture first": [("image", 1, 8, 4), 2],
    "picture last": [2, ("image", 1, 8, 4)],
    "smallest": [1, ("image", 1, 2, 2), 1],
    "several": [4, ("image", 1, 2, 20), 3, ("image", 1, 16, 6), 1, ("image", 1, 6, 6), 9],
    "video": [2, ("video", 3, 6, 10), 4],
    "mixed": [1, ("video", 2, 4, 4), 2, ("image", 1, 10, 4), 3, ("video", 4, 2, 6), 1],
}


def expand(layout):
    """Token types (0 text, 1 image, 2 video), image grids, video grids, and frame grids of a layout.

    The frames of a video stand apart, each behind two tokens of text, as the processor writes its time stamps.
    """
    types, images, videos, frames = [], [], [], []
    for item in layout:
        if isinstance(item, int):
            types += [0] * item
            continue
        kind, t, h, w = item
        (images if kind == "image" else videos).append([t, h, w])
        for step in range(t):
            types += [0, 0] if step else []
            types += [1 if kind == "image" else 2] * (h * w // MERGE**2)
            frames.append([h, w])
    return np.array(types), images, videos, np.array(frames, dtype=np.int32).reshape(-1, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mrope_positions_equal_transformers(name):
    types, images, videos, frames = expand(LAYOUTS[name])
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))
    expected, _ = model.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        mm_token_type_ids=torch.from_numpy(types)[None],
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    positions = mrope_positions(len(types), frames, np.flatnonzero(types), MERGE)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())


GRIDS = [[2, 2], [2, 30], [6, 4], [48, 48], [50, 98], [96, 2], [10, 10]]


def test_patch_coordinates_equal_transformers():
    grid_thw = torch.tensor([[1, h, w] for h, w in GRIDS])
    coordinates = patch_coordinates(np.array(GRIDS, dtype=np.int32), MERGE)
    np.testing.assert_array_equal(coordinates, get_vision_position_ids(grid_thw, MERGE).numpy())


@pytest.mark.parametrize("side", [48, 7])
def test_interpolation_equals_transformers(side):
    grids = np.array(GRIDS, dtype=np.int32)
    index, weight = grid_interpolation(grids, patch_coordinates(grids, MERGE), side)
    expected_index, expected_weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, h, w] for h, w in GRIDS]), side, align_corners=True, spatial_merge_size=MERGE
    )
    assert index.dtype == np.int32
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, expected_weight.numpy())
    np.testing.assert_array_equal(index, expected_index.numpy())


def test_tower_sees_the_same_positions():
    """Through the model: the position embedding it adds and its rotary angles, made from our tensors."""
    config = Qwen3VLVisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=8, num_position_embeddings=81)
    tower = Qwen3VLVisionModel(config)
    grids = np.array(GRIDS, dtype=np.int32)
    coordinates = patch_coordinates(grids, MERGE)
    index, weight = grid_interpolation(grids, coordinates, 9)
    seen = {}
    tower.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=args[0], angles=kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        patches = torch.randn(len(coordinates), 3 * 2 * 16 * 16)
        tower(patches, torch.tensor([[1, h, w] for h, w in GRIDS]))
        embedding = tower.pos_embed(torch.from_numpy(index)) * torch.from_numpy(weight)[..., None]
        torch.testing.assert_close(seen["hidden"], tower.patch_embed(patches) + embedding.sum(1), rtol=0, atol=0)
        cos, sin = tower.rotary_pos_emb(patches, torch.from_numpy(coordinates))
    torch.testing.assert_close(seen["angles"], (cos, sin), rtol=0, atol=0)
