"""Which adapters a server of vLLM applies by itself, and when it gets them alone. Servers here are stand-ins."""

from types import SimpleNamespace

import pytest
import torch
from vllm_stand_in import StandIn

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.vllm import adapters, keeper
from megavlm.vllm.adapters import lora_arguments, takes_adapters
from megavlm.vllm.engine import VllmEngine
from megavlm.vllm.environment import engine_arguments
from megavlm.vllm.kept import Kept

TAKES = {"rank": 8, "targets": None}

FROZEN = {"freeze": ["vision", "projector"]}
APPLIED = {"type": "lora", "rank": 6, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.fixture
def settings(model_folder):
    return lambda adapter, model=FROZEN, vllm=(), **more: Settings(
        model={"hf": str(model_folder), **model}, adapter=adapter,
        rollout={"engine": "vllm", "vllm": dict(vllm)}, **more
    )  # fmt: skip


def test_a_server_is_started_for_adapters_that_it_applies(settings):
    """vLLM has one layer for several of Hugging Face's, and knows few ranks."""
    expected = {"max_lora_rank": 8, "lora_target_modules": ["down_proj", "gate_up_proj", "qkv_proj"]}
    assert lora_arguments(settings(APPLIED)).items() >= expected.items()
    every = lora_arguments(settings({"type": "lora", "rank": 16}))  # all linear layers of the decoder
    assert every["lora_target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert every["max_lora_rank"] == 16


def test_a_server_applies_them_where_that_is_fast_or_if_it_is_asked_to(settings, monkeypatch):
    applies = lambda **more: engine_arguments(settings(APPLIED, **more))["enable_lora"]
    asked = lambda value: {"vllm": {"args": {"enable_lora": value}}}
    bf16, fp32 = ({"train": {"precision": precision}} for precision in ("bf16", "fp32"))
    assert (applies(**bf16), applies(**bf16, **asked(True))) == (False, True)
    monkeypatch.setattr(adapters, "on_gpu", lambda: True)
    assert (applies(**bf16), applies(**bf16, **asked(False)), applies(**fp32)) == (True, False, False)


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


class Weights:
    """A frozen weight, and an adapter in two buckets."""

    adapter = {"r": 6}  # noqa: RUF012

    def __init__(self):
        self.value, self.ended = 1.0, []

    def buckets(self, max_bytes, *, merged):
        yield [("frozen", torch.full((3,), 10 * self.value if merged else 1.0))]
        yield []
        self.ended.append("weights")

    def adapter_buckets(self, max_bytes):
        yield [("A", torch.full((2,), self.value))]
        yield [("B", torch.full((2,), -self.value))]
        self.ended.append("adapter")


@pytest.fixture
def make(settings, tmp_path):
    """make(servers): an engine for the adapter, and its weights."""
    engines = []

    def engine(*servers):
        groups = SimpleNamespace(world_host=SimpleNamespace(size=lambda: 1, rank=lambda: 0), dp_rank=0)
        vllm = {"url": [one.url for one in servers], "start_minutes": 0.2}
        weights = Weights()
        engines.append(VllmEngine(settings(APPLIED, vllm=vllm, data={"seq_length": 64}), groups, weights, tmp_path))
        return engines[-1], weights

    yield engine
    for one in engines:
        one.close()


def test_other_weights_come_once_and_the_adapter_each_time(server, make):
    server.lora = TAKES
    engine, weights = make(server)
    engine.sync()
    assert engine.bytes_sync == 12 + 16
    weights.value = 5.0
    engine.sync()
    assert server.updates == [["weights", "adapter"], ["adapter"]]
    assert server.tensors["frozen"].tolist() == [1, 1, 1]
    assert server.adapter["config"] == {"r": 6}
    assert (server.adapter["A"].tolist(), server.adapter["B"].tolist()) == ([5, 5], [-5, -5])
    assert engine.bytes_sync == 16
    assert sorted(path.name for path in engine._folder.glob("weights-*")) == ["weights-2", "weights-base"]
    engine.close()
    assert not list(engine._folder.glob("weights-*"))


def test_a_server_that_was_started_again_without_a_word_gets_all_of_them(server, make, monkeypatch):
    """Between two looks at a server elsewhere: it would have random weights under the adapter."""
    monkeypatch.setattr(keeper, "_ASK", 1000.0)
    server.lora = TAKES
    engine, weights = make(server)
    engine.sync()
    server.tensors, server.base, server.weights = {}, None, None
    weights.value = 5.0
    engine.sync()
    assert server.updates == [["weights", "adapter"], ["weights", "adapter"]]
    assert (server.tensors["frozen"].tolist(), server.adapter["A"].tolist()) == ([1, 1, 1], [5, 5])


def test_one_server_that_does_not_apply_it_has_it_merged_for_all(server, model_folder, make):
    server.lora, second = TAKES, StandIn(model_folder)
    engine, _ = make(server, second)
    engine.sync()
    engine.sync()
    assert server.updates == second.updates == [["weights"], ["weights"]]
    assert server.tensors["frozen"].tolist() == second.tensors["frozen"].tolist() == [10, 10, 10]
    second.http.shutdown()


def test_all_ranks_gather_to_the_end_if_nothing_can_be_written(server, make, monkeypatch):
    """Also before anything has been gathered: other ranks have begun."""

    def write(kept, buckets):
        raise OSError("the disk is full")

    server.lora = TAKES
    engine, weights = make(server)
    monkeypatch.setattr(Kept, "write", write)
    with pytest.raises(UserError, match=r"cannot be written to .*: the disk is full"):
        engine.sync()
    assert weights.ended == ["weights", "adapter"]
