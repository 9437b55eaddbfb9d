"""Which adapters a server of vLLM applies by itself, and how it is started for them."""

import pytest

from megavlm.config.settings import Settings
from megavlm.vllm.adapters import lora_arguments, takes_adapters
from megavlm.vllm.environment import engine_arguments

FROZEN = {"freeze": ["vision", "projector"]}
APPLIED = {"type": "lora", "rank": 6, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.fixture
def settings(model_folder):
    return lambda adapter, model=FROZEN, **more: Settings(
        model={"hf": str(model_folder), **model}, adapter=adapter, rollout={"engine": "vllm"}, **more
    )


def test_a_server_is_started_for_adapters_that_it_applies(settings):
    """vLLM has one layer for several of Hugging Face's, and knows few ranks."""
    expected = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "lora_target_modules": ["down_proj", "gate_up_proj", "qkv_proj"],
    }
    assert lora_arguments(settings(APPLIED)) == expected
    assert engine_arguments(settings(APPLIED)).items() >= expected.items()
    every = lora_arguments(settings({"type": "lora", "rank": 16}))  # all linear layers of the decoder
    assert every["lora_target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert every["max_lora_rank"] == 16


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ({}, {}),
        ({**APPLIED, "type": "dora"}, {}),
        ({"type": "fourierft", "frequencies": 8}, {}),
        ({**APPLIED, "rank_pattern": {"q_proj": 2}}, {}),
        ({**APPLIED, "alpha_pattern": {"q_proj": 2.0}}, {}),
        ({**APPLIED, "modules_to_save": ["embed_tokens"]}, {}),
        ({**APPLIED, "rank": 513}, {}),
        ({**APPLIED, "quantize": "nf4"}, {}),
        ({**APPLIED, "targets": ["q_proj", "attn.qkv"]}, {}),
        (APPLIED, {"model": {"freeze": ["vision"]}}),
        (APPLIED, {"train": {"unfreeze_after": {"projector": 5}}}),
    ],
)
def test_other_adapters_are_merged(adapter, more, settings):
    assert lora_arguments(settings(adapter, **more)) == {}
    assert not takes_adapters({"rank": 512, "targets": None}, settings(adapter, **more))


@pytest.mark.parametrize(
    ("lora", "takes"),
    [
        (None, False),
        ({"rank": 8, "targets": None}, True),
        ({"rank": 8, "targets": ["qkv_proj", "gate_up_proj", "down_proj", "o_proj"]}, True),
        ({"rank": 1, "targets": None}, False),
        ({"rank": 8, "targets": ["qkv_proj", "gate_up_proj"]}, False),
    ],
)
def test_a_server_that_runs_already_says_what_it_takes(lora, takes, settings):
    assert takes_adapters(lora, settings(APPLIED)) == takes
