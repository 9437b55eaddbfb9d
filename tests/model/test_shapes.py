"""Shapes read from config.json, in the spelling of the released folders and in transformers 5's own."""

import json

import pytest
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from megavlm.base.errors import UserError
from megavlm.model.shapes import MoeShape, Shapes

# Fields of the released Qwen3-VL-30B-A3B-Instruct, written by transformers 4.57 (rope_scaling, num_experts).
RELEASED_MOE = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl_moe",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def changed(section, **fields):
    config = json.loads(json.dumps(RELEASED_MOE))
    (config[section] if section else config).update(fields)
    return config


def test_released_spelling(tmp_path):
    shapes = Shapes.from_hf(write(tmp_path, RELEASED_MOE))
    text, vision = shapes.text, shapes.vision
    assert (text.hidden, text.layers, text.heads, text.kv_heads, text.head_dim) == (2048, 48, 32, 4, 128)
    assert (text.rope_theta, text.mrope_section, text.rms_eps) == (5e6, (24, 20, 20), 1e-6)
    assert text.moe == MoeShape(128, 8, 768, 1, ())
    assert (vision.layers, vision.hidden, vision.head_dim, vision.ffn) == (27, 1152, 72, 4304)
    assert (vision.patch_dim, vision.grid_side, vision.merged_hidden) == (1536, 48, 4608)
    assert (vision.deepstack_layers, vision.out_hidden) == ((8, 16, 24), 2048)
    assert (shapes.image_token_id, shapes.vision_end_token_id) == (151655, 151653)
    assert not shapes.tied


def test_round_trip_through_transformers(tmp_path):
    released = Shapes.from_hf(write(tmp_path / "a", RELEASED_MOE))
    Qwen3VLMoeConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert "rope_parameters" in (tmp_path / "b" / "config.json").read_text()
    assert Shapes.from_hf(tmp_path / "b") == released


def test_dense_and_tied(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text["rope_parameters"] = rope
    vision = {"depth": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [1]}
    Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True).save_pretrained(tmp_path)
    shapes = Shapes.from_hf(tmp_path)
    assert shapes.tied
    assert shapes.text.moe is None
    assert shapes.text.mrope_section == (4, 2, 2)
    assert not shapes.text.is_moe_layer(0)


def test_which_layers_are_moe(tmp_path):
    shapes = Shapes.from_hf(write(tmp_path, changed("text_config", decoder_sparse_step=2, mlp_only_layers=[3])))
    assert [shapes.text.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{not json", "not valid JSON"),
        ({"model_type": "llama"}, "'llama'"),
        (changed("text_config", num_key_value_heads=5), "multiple of num_key_value_heads"),
        (changed("text_config", hidden_size="wide"), "cannot be read"),
        (changed("vision_config", out_hidden_size=4096), "out_hidden_size"),
        (changed("vision_config", deepstack_visual_indexes=[8, 27]), "0..26"),
        (changed("vision_config", num_position_embeddings=2000), "square"),
    ],
)
def test_bad_config_is_named(tmp_path, config, words):
    with pytest.raises(UserError, match=words) as raised:
        Shapes.from_hf(write(tmp_path, config))
    assert str(tmp_path / "config.json") in str(raised.value)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(UserError, match="no such Hugging Face folder"):
        Shapes.from_hf(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        Shapes.from_hf(tmp_path)
