"""Stretched rotary frequencies are those of transformers, and what is not implemented is refused by name."""

import json

import pytest
import torch
from test_shapes import RELEASED_MOE, changed, write
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

from megavlm.base.errors import UserError
from megavlm.config.settings import ParallelSettings, TrainSettings
from megavlm.model.configs import decoder_config
from megavlm.model.rope import InterleavedMRoPE
from megavlm.model.shapes import Shapes

YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262144}  # the model's own recipe
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn, short": {**YARN, "original_max_position_embeddings": 64},
    "yarn, shorter than one turn": {**YARN, "original_max_position_embeddings": 4},
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, mscale": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, betas": {**YARN, "beta_fast": 20, "beta_slow": 2.5, "truncate": False},
    "yarn, factor 1": {**YARN, "factor": 1.0},
    "yarn, no factor": {**YARN, "factor": None, "original_max_position_embeddings": 65536},
    "yarn, no original length": {"rope_type": "yarn", "factor": 3.0},
}


def with_rope(rope: dict) -> dict:
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", **rope}
    return changed("text_config", rope_scaling=rope)


@pytest.mark.parametrize("name", ROPES)
def test_stretched_angles_are_those_of_transformers(name, tmp_path):
    config = with_rope(ROPES[name])
    text = Shapes.from_hf(write(tmp_path, config)).text
    reference = Qwen3VLMoeTextRotaryEmbedding(Qwen3VLMoeTextConfig(**json.loads(json.dumps(config))["text_config"]))
    ours = InterleavedMRoPE(text.head_dim, text.rope_theta, text.mrope_section, text.rope_scaling)
    assert torch.equal(ours.inv_freq, reference.inv_freq)
    factor = text.rope_scaling.attention_factor if text.rope_scaling else 1.0
    assert factor == pytest.approx(reference.attention_scaling, rel=1e-12)

    positions = torch.tensor([[0, 3, 900, 700_000], [0, 5, 901, 700_000], [0, 7, 990, 700_000]])
    cos, sin = reference(torch.zeros(1), positions[:, None])
    angles = ours(positions)[:, 0, 0]
    assert torch.equal(angles.cos() * factor, cos[0])
    assert torch.equal(angles.sin() * factor, sin[0])


def test_the_attention_factor_scales_the_products_of_queries_and_keys(tmp_path):
    config = lambda rope: decoder_config(
        Shapes.from_hf(write(tmp_path, with_rope(rope))),
        ParallelSettings(),
        TrainSettings(),
        "portable",
        grouped_experts=False,
    )
    assert config({}).softmax_scale is None
    assert config({**YARN, "attention_factor": 0.8}).softmax_scale == pytest.approx(0.64 / 128**0.5)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'.*allowed: default, linear, yarn"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}, "rope_type 'llama3'"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}, "rope_type 'longrope'"),
        ({"rope_type": "proportional"}, "rope_type 'proportional'"),
        ({"rope_type": "mrope"}, "rope_type 'mrope'"),
        ({**YARN, "factor": "3"}, "factor '3'"),
        ({**YARN, "factor": 0}, "factor 0"),
        ({**YARN, "factor": float("nan")}, "factor nan"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor -1.0"),
        ({**YARN, "original_max_position_embeddings": True}, "original_max_position_embeddings True"),
        ({**YARN, "beta_fast": 0}, "beta_fast 0"),
        ({"rope_type": "linear"}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"mrope_interleaved": False}, "mrope_interleaved False"),
        ({"rope_theta": 1}, "rope_theta 1"),
        ({"mrope_section": [32, 32]}, "three numbers"),
    ],
)
def test_other_ropes_are_refused_by_name(rope, words, tmp_path):
    with pytest.raises(UserError, match=words) as raised:
        Shapes.from_hf(write(tmp_path, with_rope(rope)))
    assert str(tmp_path / "config.json") in str(raised.value)


def test_released_models_are_not_stretched(tmp_path):
    assert Shapes.from_hf(write(tmp_path, RELEASED_MOE)).text.rope_scaling is None
