"""Long values in the files of a model's folder: messages quote the beginning and the end of them at most."""

import json
import shutil

import pytest

from megavlm.base.errors import UserError
from megavlm.convert.peft_config import ADAPTER_CONFIG, read_config
from megavlm.data import limits
from megavlm.model.rope_scaling import rope_scaling
from megavlm.model.shapes import Shapes

LONG = "word\n" * 2000
ROPE = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def refusal(function, *arguments):
    with pytest.raises(UserError) as refused:
        function(*arguments)
    assert len(refused.value.message) < 700
    assert "\n" not in refused.value.message
    return refused.value.message


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "hf")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("", "model_type", LONG),
        ("text_config", "hidden_act", LONG),
        ("text_config", "layer_types", [LONG]),
        ("text_config", "num_hidden_layers", LONG),
        ("text_config", "quantization_config", {"a": LONG}),
        ("text_config", "rope_parameters", ROPE | {"rope_type": LONG}),
        ("vision_config", "rope_parameters", {"rope_type": LONG, "rope_theta": 1e4}),
        ("vision_config", "patch_size", [1] * 5000),
    ],
)
def test_in_config_json(folder, section, name, value):
    content = json.loads((folder / "config.json").read_text())
    (content[section] if section else content)[name] = value
    (folder / "config.json").write_text(json.dumps(content))
    assert "config.json" in refusal(Shapes.from_hf, folder)


@pytest.mark.parametrize(
    "wrong",
    [{"rope_type": LONG}, {"partial_rotary_factor": LONG}, {"mrope_interleaved": [LONG]}, {"rope_theta": LONG},
     {"factor": LONG}],
)  # fmt: skip
def test_in_the_scaling_of_positions(wrong):
    assert next(iter(wrong)) in refusal(rope_scaling, ROPE | wrong, 64, 1000, "here")


@pytest.mark.parametrize(
    "wrong",
    [{"peft_type": LONG}, {"unknown": LONG}, {"unknown": [LONG] * 9}, {"target_modules": f"({LONG}"},
     {"r": LONG}, {"rank_pattern": {LONG: LONG}}, {"modules_to_save": LONG}, {"lora_alpha": [LONG]}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_in_the_description_of_an_adapter(model_folder, tmp_path, wrong):
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(ADAPTER | wrong))
    assert ADAPTER_CONFIG in refusal(read_config, tmp_path, Shapes.from_hf(model_folder))


def test_in_what_transformers_says_of_a_processor(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError(LONG)

    monkeypatch.setattr(limits.AutoProcessor, "from_pretrained", fail)
    assert "its processor cannot be loaded: word word" in refusal(limits.load_processor, folder)
