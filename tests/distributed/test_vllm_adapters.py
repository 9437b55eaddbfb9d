"""Adapters that real vLLM applies by itself: they come alone, and answers are those of the trainer's own engine."""

import threading

import pytest
import torch
from test_engine import engine_of, tokens_of
from toy import read_samples
from vllm_served import CLOSE, by_index

from megavlm.config.settings import Settings

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"adapter": {"type": "lora", "rank": 6, "alpha": 24.0, "targets": TARGETS}}


def from_a_trainer(settings: dict, sampling) -> list[dict]:
    """Runs on every rank: answers of vLLM, and then of the built-in engine, with adapters that change in between.

    The server is lost after the second change.
    """
    from megavlm.data.renderer import Renderer
    from megavlm.model.vlm import PARTS
    from megavlm.reinforcement.engines import make_engine
    from megavlm.rollout.engine import Prompt
    from megavlm.runtime import session

    settings = Settings(**settings)
    session = session.start(settings, training=True)
    own = [p for part in PARTS for module in session.vlm.modules_of(part) for p in module.parameters()]
    renderer = Renderer(settings.model.hf, settings.data)
    samples = read_samples(settings.data.eval[0].path, renderer, "prompt")[:16]
    prompts = lambda: iter([Prompt(sample, (0,)) for sample in samples]) if session.groups.is_leader else None
    engine, found = make_engine(session), []
    for change in range(2):
        for parameter in own:
            if parameter.requires_grad:  # copies on other ranks change alike
                parameter.data += 0.03 * (torch.arange(parameter.numel()) + change).cos().view_as(parameter)
        engine.sync()
        found.append({"vllm": by_index(engine.generate(prompts(), sampling)), "bytes": engine.bytes_sync})
        session.vlm.train(False)
        found[-1]["built in"] = by_index(engine_of(session, renderer, places=16).generate(prompts(), sampling))
        session.vlm.train(True)
    while_they_come: list = []
    thread = threading.Thread(target=lambda: while_they_come.extend(engine.generate(prompts(), sampling)))
    thread.start()
    for _ in range(3):
        engine.sync()
    thread.join()
    found[-1]["while they come"] = by_index(while_they_come)
    if session.is_first:
        engine._keepers[0]._process.kill()
    found[-1]["started again"] = by_index(engine.generate(prompts(), sampling))
    engine.close()
    return found


def test_adapters_come_alone(python, toys, asked, sampling, world2, tmp_path):
    settings = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense")),
                  "freeze": ["vision", "projector"]},
        "data": {"eval": str(asked[1]), "seq_length": 512},
        "train": {"precision": "fp32"},
        "parallel": {"tensor": 2},
        "rollout": {"engine": "vllm", "max_sequences": 16, "cache_gib": 0.25, "ahead": 1},
        "output": str(tmp_path),
        **LORA,
    }  # fmt: skip
    (first, second), _ = world2.run(from_a_trainer, settings, sampling(12), timeout=300)
    for one in (first, second):
        assert tokens_of(one["vllm"]) == tokens_of(one["built in"])
        for index, (answer,) in one["vllm"].items():
            assert answer.logprobs == pytest.approx(one["built in"][index][0].logprobs, abs=CLOSE)
    assert tokens_of(first["vllm"]) != tokens_of(second["vllm"])  # the adapters matter
    assert second["bytes"] < first["bytes"] / 10
    assert tokens_of(second["while they come"]) == tokens_of(second["vllm"])
    assert tokens_of(second["started again"]) == tokens_of(second["vllm"])
    assert not list((tmp_path / "vllm").glob("weights-*"))
