"""Each field of config.json that transformers reads is used, refused unless it has our value, or shown not to matter.

The fields are those of transformers' own classes, so that a field which a later version adds fails here.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from test_shapes import RELEASED_MOE, changed, write
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLMoeConfig

from megavlm.base.errors import UserError
from megavlm.model.configs import _ACTIVATIONS, check_supported
from megavlm.model.shapes import ACTIVATIONS, Shapes

# By section of config.json ("": itself) the fields that change the shapes, with another value.
USED = {
    "": {
        "text_config": None, "vision_config": None,  # the sections
        "image_token_id": 7, "video_token_id": 7, "vision_start_token_id": 7, "vision_end_token_id": 7,
        "tie_word_embeddings": True,
    },
    "text_config": {
        "vocab_size": 256, "hidden_size": 1024, "intermediate_size": 100, "num_hidden_layers": 47,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "gelu",
        "max_position_embeddings": 4096, "initializer_range": 0.01, "rms_norm_eps": 1e-5, "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        "decoder_sparse_step": 2, "moe_intermediate_size": 100, "num_experts": 64, "num_experts_per_tok": 4,
        "mlp_only_layers": [1],
    },
    "vision_config": {
        "depth": 26, "hidden_size": 576, "intermediate_size": 100, "num_heads": 8, "in_channels": 1, "patch_size": 14,
        "spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": 100, "num_position_embeddings": 100,
        "deepstack_visual_indexes": [1], "hidden_act": "gelu", "initializer_range": 0.01,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0},
    },
}  # fmt: skip
# Fields, and further names that transformers looks for, of which only one value is computed.
REFUSED = {
    "": {
        "is_encoder_decoder": True,
        "quantization_config": {"quant_method": "fp8"},
        "per_layer_config": {"3": {"intermediate_size": 8}},
    },
    "text_config": {
        "attention_dropout": 0.1, "is_causal": False, "norm_topk_prob": False, "hidden_act": "relu",
        "layer_types": ["sliding_attention"] * 48, "quantization_config": {"quant_method": "fp8"},
        "per_layer_config": {"3": {"intermediate_size": 8}},
        "num_experts_per_tok": 1, "decoder_sparse_step": 0, "hidden_size": 0, "rms_norm_eps": float("nan"),
    },
    "vision_config": {
        "head_dim": 64, "per_layer_config": {"3": {"intermediate_size": 8}}, "hidden_act": "relu",
        "patch_size": [16, 8], "temporal_patch_size": [2, 2], "num_heads": 0,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        "deepstack_visual_indexes": [16, 8, 24],
    },
}  # fmt: skip
# Fields without effect on what is computed here: why, and another value.
ANYWHERE = {
    "transformers_version": ("says who wrote the file", "4.57.0"),
    "architectures": ("model_type names the model", ["Another"]),
    "output_hidden_states": ("what transformers returns, not what it computes", True),
    "return_dict": ("what transformers returns, not what it computes", False),
    "dtype": ("the dtype of transformers' weights; here train.precision", "float64"),
    "chunk_size_feed_forward": ("qwen3_vl does not read it", 3),
    "id2label": ("for classifiers", {"0": "a"}),
    "label2id": ("for classifiers", {"a": 0}),
    "problem_type": ("for classifiers", "regression"),
    "is_encoder_decoder": ("qwen3_vl does not read it in a section", True),
}
WITHOUT_EFFECT = {
    "": ANYWHERE,
    "text_config": {
        **ANYWHERE,
        "use_cache": ("answers are the same without a cache", False),
        "pad_token_id": ("keeps transformers from training one row of the embedding; padding of a row trains none", 3),
        "bos_token_id": ("the chat template writes it", 3),
        "eos_token_id": ("generation_config.json or the tokenizer ends answers", 3),
        "tie_word_embeddings": ("the field of config.json itself counts", True),
        "output_router_logits": ("train.moe_aux_loss_coeff says whether experts are balanced", True),
        "router_aux_loss_coef": ("train.moe_aux_loss_coeff is the weight", 0.5),
    },
    "vision_config": ANYWHERE,
}
SECTIONS = list(USED)


def classes(section: str) -> list[type]:
    """The dense and the MoE configuration class of a section."""
    of = [kind() for kind in (Qwen3VLConfig, Qwen3VLMoeConfig)]
    return [type(getattr(config, section) if section else config) for config in of]


def cases(table: dict) -> list[tuple]:
    return [(section, name, value) for section, fields in table.items() for name, value in fields.items()]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_that_transformers_knows_is_accounted_for(section):
    fields = {field.name for kind in classes(section) for field in dataclasses.fields(kind)}
    assert fields <= USED[section].keys() | REFUSED[section].keys() | WITHOUT_EFFECT[section].keys()
    assert USED[section].keys() <= fields  # none of ours has gone


@pytest.mark.parametrize(("section", "name", "value"), cases(USED))
def test_a_used_field_changes_the_shapes(section, name, value, tmp_path):
    if value is None:
        return
    fields = {name: value}
    if (section, name) == ("text_config", "rope_parameters"):
        fields["rope_scaling"] = None
    before = Shapes.from_hf(write(tmp_path / "before", RELEASED_MOE))
    try:
        assert Shapes.from_hf(write(tmp_path / "after", changed(section, **fields))) != before
    except UserError as error:  # it contradicts another field, and the message names it
        assert name in str(error)  # noqa: PT017


@pytest.mark.parametrize(("section", "name", "value"), cases(REFUSED))
def test_another_value_than_ours_is_refused_by_name(section, name, value, tmp_path):
    with pytest.raises(UserError, match=name) as raised:
        Shapes.from_hf(write(tmp_path, changed(section, **{name: value})))
    assert "config.json" in str(raised.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_field_without_effect_changes_no_shape(section, tmp_path):
    before = Shapes.from_hf(write(tmp_path / "before", RELEASED_MOE))
    others = {name: value for name, (_, value) in WITHOUT_EFFECT[section].items()}
    if not section:
        del others["is_encoder_decoder"]  # refused there
    assert Shapes.from_hf(write(tmp_path / "after", changed(section, **others))) == before


def test_fields_without_effect_change_no_logit_of_transformers(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    ids = torch.arange(3, 20)[None]

    def logits() -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(input_ids=ids, return_dict=True).logits

    before, config = logits(), json.loads((tmp_path / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        others = {name: value for name, (_, value) in WITHOUT_EFFECT[section].items()}
        del others["return_dict"]  # transformers' own code cannot use it there
        config[section] |= others
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).text_config.use_cache is False
    assert torch.equal(logits(), before)


def test_biases_of_attention_can_be_converted_but_not_run(tmp_path):
    shapes = Shapes.from_hf(write(tmp_path, changed("text_config", attention_bias=True)))
    with pytest.raises(UserError, match="attention_bias is true"):
        check_supported(shapes)


def test_every_activation_is_implemented():
    assert tuple(_ACTIVATIONS) == ACTIVATIONS
