"""The table names exactly the weights of transformers' own models, with their shapes."""

import pytest
import torch
from tiny_models import make_config
from transformers import AutoModelForImageTextToText

from megavlm.convert.names import table
from megavlm.model.shapes import Shapes


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "attention bias"])
def test_covers_transformers_model(moe, tied, bias, tmp_path):
    config = make_config(moe, tied, attention_bias=bias)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    entries = table(Shapes.from_hf(tmp_path))
    assert {name: shape for entry in entries for name, shape in entry.hf.items()} == expected
    assert len({entry.key for entry in entries}) == len(entries)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_layouts_agree_with_the_shapes(moe, tmp_path):
    make_config(moe, attention_bias=True).save_pretrained(tmp_path)
    for entry in table(Shapes.from_hf(tmp_path)):
        parts = [torch.empty(shape, device="meta") for shape in entry.hf.values()]
        tensor = entry.layout.to_mcore(parts, entry.shape)
        assert tuple(tensor.shape) == entry.shape, entry.key
        back = entry.layout.to_hf(tensor, list(entry.hf.values()))
        assert [tuple(part.shape) for part in back] == list(entry.hf.values()), entry.key


def test_megatron_keys(tmp_path):
    make_config(moe=True).save_pretrained(tmp_path)
    shapes = {entry.key: entry.shape for entry in table(Shapes.from_hf(tmp_path))}
    assert shapes["vision.patch_embed.weight"] == (32, 3 * 2 * 4 * 4)
    assert shapes["vision.layers.2.self_attention.linear_qkv.layer_norm_bias"] == (32,)
    assert shapes["projector.merger.norm.weight"] == (32,)
    assert shapes["projector.deepstack.1.norm.weight"] == (128,)
    assert shapes["language.decoder.layers.0.self_attention.linear_qkv.weight"] == (4 * 16 + 2 * 2 * 16, 48)
    assert shapes["language.decoder.layers.0.mlp.experts.experts.linear_fc1.weight"] == (4, 40, 48)
    assert shapes["language.decoder.layers.0.mlp.router.weight"] == (4, 48)
    assert shapes["language.decoder.layers.0.pre_mlp_layernorm.weight"] == (48,)
    assert shapes["language.decoder.layers.1.mlp.linear_fc1.weight"] == (160, 48)
    assert shapes["language.decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] == (48,)
    assert shapes["language.output_layer.weight"] == (64, 48)
