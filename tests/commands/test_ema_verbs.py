"""The moving average of the weights (train.ema) where it is used: score and infer read what export writes."""

import json

import pytest
from parity import Toys
from test_train_verbs import megavlm, sft_config
from toy import write_records

TP2 = ("parallel.tensor=2", "--nproc", 2)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def test_score_and_infer_use_the_average(toys, tmp_path):
    data = write_records(toys.root / "scored.jsonl", toys.records[:3])
    config = sft_config(toys, tmp_path, optimizer="adam", lr=3e-3, steps=2, ema=0.5)
    run = tmp_path / "run"
    megavlm("sft", config)
    megavlm("export", config, "--ema", "--out", tmp_path / "hf")

    def sums(name, *arguments):
        out = tmp_path / name
        told = megavlm("score", config, f"data.eval={data}", f"output={out}", *arguments).stdout
        note = json.loads((out / "scores.json").read_text())
        assert ("moving average" in told, "ema" in str(note)) == (("--ema" in arguments),) * 2
        return [json.loads(line)["sum"] for line in (out / "scores.jsonl").read_text().splitlines()]

    exported = sums("exported", f"model.load={tmp_path / 'hf'}")
    assert sums("averaged", f"model.load={run}", "--ema") == exported
    # the tensor-parallel sums differ in their order: float32's rounding of log-probabilities in the hundreds
    assert sums("split", f"model.load={run}", "--ema", *TP2) == pytest.approx(exported, rel=1e-5)
    assert sums("plain", f"model.load={run}") != pytest.approx(exported, rel=1e-5)
    answered = megavlm("infer", config, "--ema", "--prompt", "What?", "generate.max_new_tokens=2")
    assert f"step 2 of {run}" in answered.stderr
    assert "moving average" in answered.stderr
    refused = megavlm("infer", config, "--ema", "--prompt", "?", f"model.load={tmp_path / 'hf'}", status=2)
    assert "Traceback" not in refused.stderr
