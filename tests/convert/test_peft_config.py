"""adapter_config.json, written and read."""

import json
import re

import pytest

from megavlm.base.errors import UserError
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.peft_config import ADAPTER_CONFIG, config_of, read_config, write_config
from megavlm.convert.peft_names import rank_of, scale_of
from megavlm.model.shapes import Shapes


def test_patterns_keep_their_order(dense, tmp_path):
    """The first pattern that matches is used, as in peft."""
    shapes, name = Shapes.from_hf(dense), "model.language_model.layers.0.self_attn.v_proj"
    patterns = {"rank_pattern": {"v_proj": 4, ".*_proj": 2}, "alpha_pattern": {"v_proj": 3.0, ".*_proj": 5.0}}
    adapter = AdapterSettings(type="lora", targets=["q_proj", "v_proj"], **patterns)
    write_config(tmp_path / ADAPTER_CONFIG, adapter, shapes)
    read = read_config(tmp_path, shapes)
    assert rank_of(read, name) == 4
    assert scale_of(read, name) == 3 / 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": None}, "Input should be a valid integer"),
        ({"r": "8"}, "Input should be a valid integer"),
        ({"lora_alpha": 0}, "greater than 0"),
        ({"lora_alpha": None}, "TypeError"),
        ({"target_modules": []}, "at least 1 item"),
        ({"target_modules": "(q_proj"}, "cannot be used"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_used_is_said(dense, tmp_path, changes, told):
    shapes = Shapes.from_hf(dense)
    write_config(tmp_path / ADAPTER_CONFIG, AdapterSettings(type="lora", targets=["q_proj"]), shapes)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text()) | changes
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(told)):
        read_config(tmp_path, shapes)


def test_targets_are_written_as_peft_matches_them(dense, moe):
    """Without the convolution whose name ends in "proj"; with experts and the dense layer among them."""
    of = lambda folder, *targets: config_of(AdapterSettings(type="lora", targets=list(targets)), Shapes.from_hf(folder))
    assert of(dense, "proj", "q_proj")["target_modules"] == ["attn.proj", "q_proj"]
    config = of(moe, "down_proj", "mlp.experts.gate_up_proj")
    assert config["target_modules"] == ["down_proj"]
    assert config["target_parameters"] == ["down_proj", "mlp.experts.gate_up_proj"]
