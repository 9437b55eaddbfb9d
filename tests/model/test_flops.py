"""Model FLOPs against what torch counts while transformers' own model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from megavlm.model.flops import Work, active_decoder_weights, forward_flops, peak_flops, step_flops
from megavlm.model.shapes import Shapes

TEXT = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 64, "intermediate_size": 112, "num_heads": 2, "out_hidden_size": 96,
    "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
MOE = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
}  # fmt: skip
TOKENS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
GRID = (8, 12)  # patches of the picture
LENGTH = 90  # tokens of the sample


def build(moe):
    config = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config={**TEXT, **MOE} if moe else TEXT, vision_config=VISION, tie_word_embeddings=False, **TOKENS
    )
    config._attn_implementation = "eager"  # the counter sees products of matrices only
    if moe:
        config._experts_implementation = config.text_config._experts_implementation = "eager"
    model = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config)
    return model.train(), config


def counted(model, frozen):
    """The operations of the forward and the backward pass as torch counts them."""
    prefixes = {"vision": ("patch_embed", "pos_embed", "blocks"), "projector": ("merger", "deepstack_merger_list")}
    for name, weight in model.named_parameters():
        below = name.split("model.visual.")[-1]
        part = next((part for part in prefixes if below.startswith(prefixes[part])), "language")
        weight.requires_grad = part not in frozen
    patches = GRID[0] * GRID[1]
    ids = torch.randint(1, 280, (1, LENGTH))
    ids[0, 10 : 10 + patches // 4] = TOKENS["image_token_id"]
    ids[0, 9] = TOKENS["vision_start_token_id"]
    with FlopCounterMode(display=False) as counter:
        loss = model(
            input_ids=ids,
            pixel_values=torch.randn(patches, 3 * 2 * 16 * 16),
            image_grid_thw=torch.tensor([[1, *GRID]]),
            mm_token_type_ids=(ids == TOKENS["image_token_id"]).int(),
        ).logits.sum()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model_and_shapes(request, tmp_path_factory):
    model, config = build(request.param)
    folder = tmp_path_factory.mktemp("hf")
    config.save_pretrained(folder)
    return model, Shapes.from_hf(folder)


@pytest.mark.parametrize(
    "frozen",
    [[], ["vision", "language"], ["vision"], ["language"], ["projector"], ["vision", "projector"],
     ["vision", "projector", "language"]],
    ids=lambda frozen: "+".join(frozen) or "nothing",
)  # fmt: skip
def test_agrees_with_torch_counter(model_and_shapes, frozen):
    model, shapes = model_and_shapes
    patches = GRID[0] * GRID[1]
    work = Work(LENGTH, LENGTH**2, LENGTH, patches, patches**2)
    # transformers computes the whole square of attention, of which causality needs half: add the other half
    other_half = forward_flops(shapes, work)["language"].attention * (1 if len(frozen) == 3 else 3)
    expected = counted(model, frozen)
    assert step_flops(shapes, work, frozen) + other_half == pytest.approx(expected, rel=2e-3)


def test_squares_of_segments_and_frames_count(model_and_shapes):
    _, shapes = model_and_shapes
    one = Work(100, 100**2, 50, 64, 64**2)
    two = Work(100, 2 * 50**2, 50, 64, 2 * 32**2)
    assert step_flops(shapes, one) - step_flops(shapes, two) == pytest.approx(
        3 * (2 * 5000 * 4 * 32 * 4 + 4 * 2048 * 64 * 3)
    )


def test_from_counts():
    counts = {"tokens": 3.0, "segment_squares": 9.0, "target_tokens": 2.0, "patches": 0.0, "frame_squares": 0.0}
    assert Work.from_counts({**counts, "images": 4}) == Work(3, 9, 2, 0, 0)


def test_active_weights_of_moe(model_and_shapes):
    model, shapes = model_and_shapes
    layers = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.dim() > 1]
    stored = sum(weight.numel() for weight in layers)
    idle = 0 if shapes.text.moe is None else (6 - 2) * 3 * 48 * 96  # one MoE layer: 1, as 3 is listed as dense
    assert active_decoder_weights(shapes.text) == stored - idle


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4),
     ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA H20", 148)],
)  # fmt: skip
def test_peak(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_unknown_device_has_no_peak():
    assert peak_flops("GeForce GTX 970") is None
    assert peak_flops(None) is None
