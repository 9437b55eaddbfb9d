"""Adapters that real vLLM applies by itself: they come alone, and answers are those of the trainer's own engine."""

import threading

import pytest
import torch.distributed as dist
from test_engine import engine_of, tokens_of
from toy import read_samples
from vllm_runs import change
from vllm_served import CLOSE, by_index

from megavlm.config.settings import Settings
from megavlm.vllm.client import Client, NotReady

LORA = {"type": "lora", "rank": 6, "alpha": 20.0, "rslora": True}
CASES = {
    "dense, TP2": ("dense", ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], {"tensor": 2}),
    "moe, EP2": ("moe", ["q_proj", "k_proj", "o_proj"], {"expert": 2}),
}


def from_a_trainer(settings: dict, sampling, long) -> list[dict]:
    """Runs on every rank: answers of vLLM, and of the built-in engine, with adapters that change in between.

    The last answers of vLLM are those during which the adapters change, and those of a server that was lost.
    """
    from megavlm.data.renderer import Renderer
    from megavlm.reinforcement.engines import make_engine
    from megavlm.rollout.engine import Prompt
    from megavlm.runtime import session

    settings = Settings(**settings)
    session = session.start(settings, training=True)
    renderer, groups = Renderer(settings.model.hf, settings.data), session.groups
    samples = read_samples(settings.data.eval[0].path, renderer, "prompt")[:16][groups.dp_rank :: groups.dp_size]
    prompts = lambda: iter([Prompt(sample, (0,)) for sample in samples]) if groups.is_leader else None
    engine, found = make_engine(session), []
    assert engine.sends_adapters

    for number in range(2):
        change(session, number)
        engine.sync()
        found.append({"vllm": by_index(engine.generate(prompts(), sampling)), "bytes": engine.bytes_sync})
        session.vlm.train(False)
        found[-1]["built in"] = by_index(engine_of(session, renderer, places=16).generate(prompts(), sampling))
        session.vlm.train(True)
    found[-1]["before"] = by_index(engine.generate(prompts(), long))
    meanwhile: list = []
    thread = threading.Thread(target=lambda: meanwhile.extend(engine.generate(prompts(), long)))
    thread.start()
    change(session, 2)
    engine.sync()
    found[-1]["were asked"] = thread.is_alive()
    thread.join()
    found[-1]["meanwhile"] = by_index(meanwhile)
    found[-1]["after"] = by_index(engine.generate(prompts(), long))
    dist.barrier()
    if session.is_first:
        update = {"partial": "continue", "weights": False, "base": "of another run"}
        with pytest.raises(NotReady, match="does not have the weights for the adapter"):
            Client(engine._urls[0]).post("/weights/start", update, 60.0)
        engine._keepers[0]._process.kill()
    found[-1]["started again"] = by_index(engine.generate(prompts(), long))
    dist.barrier()
    engine.close()
    return found


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * x.startswith("moe")) for x in CASES])
def test_adapters_come_alone(case, python, toys, asked, sampling, world2, tmp_path):
    kind, targets, parallel = CASES[case]
    settings = {
        "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind)), "freeze": ["vision", "projector"]},
        "data": {"eval": str(asked[1]), "seq_length": 512},
        "train": {"precision": "fp32"},
        "adapter": {**LORA, "targets": targets},
        "parallel": parallel,
        "rollout": {
            "engine": "vllm",
            "max_sequences": 16,
            "cache_gib": 0.25,
            "ahead": 1,
            "vllm": {"args": {"enable_lora": True}},
        },  # on a CPU they are merged otherwise
        "output": str(tmp_path),
    }
    ranks = world2.run(from_a_trainer, settings, sampling(12), sampling(80), timeout=300)
    for first, second in ranks:
        for one in (first, second):
            assert tokens_of(one["vllm"]) == tokens_of(one["built in"])
            for index, (answer,) in one["vllm"].items():
                assert answer.logprobs == pytest.approx(one["built in"][index][0].logprobs, abs=CLOSE)
    first, second = ranks[0]
    assert tokens_of(first["vllm"]) != tokens_of(second["vllm"])  # the adapters matter
    assert second["bytes"] < first["bytes"] / 10
    before, meanwhile, after = (tokens_of(second[when]) for when in ("before", "meanwhile", "after"))
    assert second["were asked"]
    went_on = [index for index in meanwhile if meanwhile[index] not in (before[index], after[index])]
    assert went_on  # begun with the old adapter, ended with the new one
    assert any(meanwhile[index][0][:2] == before[index][0][:2] for index in went_on)
    assert tokens_of(second["started again"]) == after
    assert not list((tmp_path / "vllm").glob("weights-*"))
