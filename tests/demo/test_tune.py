"""The tuning demo without its training: what it goes on from, what it runs, and when it says that a bound is missed."""

import pytest
import torch

from megavlm.base.errors import UserError
from megavlm.convert.mcore_checkpoint import TensorToWrite, write_checkpoint
from megavlm.demo import tune
from megavlm.demo.answers import expected_answers
from megavlm.demo.data import read_records, write_records

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def out(pretrained):
    return pretrained


def write_answers(folder, given):
    folder.mkdir(exist_ok=True)
    write_records(folder / "answers.jsonl", ({"index": i, "answer": answer} for i, answer in enumerate(given)))


def verbs(commands):
    return [command[3] if command[2] == "megavlm" else command[1] for command in commands]


def test_goes_on_from_what_the_demo_left(out, started):
    tune.Tune(out).prepare(overwrite=False)
    assert started.commands == []
    assert (out / "tune").is_dir()


def test_pretrains_first_what_is_not_pretrained(out, started):
    """An unfinished demo is replaced only when that is wished; in a fresh folder there is nothing to replace."""
    (out / "stage3" / "checkpoints" / "step_00000006").rename(out / "stage3" / "checkpoints" / "step_00000004")
    with pytest.raises(UserError, match="exists already"):
        tune.Tune(out).prepare(overwrite=False)
    assert (out / "stage3").is_dir()
    for link in ("data", "model"):
        (out / link).unlink()
    tune.Tune(out).prepare(overwrite=True)
    assert not (out / "stage3").exists()
    assert verbs(started.commands) == ["pretrain"] * 4
    assert tune.Tune(out).train.is_file()


def test_an_earlier_run_is_replaced_only_when_that_is_wished(out, started, capsys):
    (out / "tune").mkdir()
    (out / "tune" / "pairs.jsonl").write_text("kept")
    assert tune.main(["--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "tune" / "pairs.jsonl").read_text() == "kept"
    started.failing = "rm"
    assert tune.main(["--out", str(out), "--overwrite"]) == 1
    assert verbs(started.commands) == ["rm"]
    assert (out / "tune" / "pairs.jsonl").read_text() != "kept"


def test_commands(out, started):
    run = tune.Tune(out)
    run.prepare(overwrite=False)
    asked = read_records(run.train)[:: tune.SAMPLE_EVERY]
    write_answers(
        run.out / "sampled", ["no digit" if i < 7 else r["messages"][1]["content"] for i, r in enumerate(asked)]
    )
    run.reward_model()
    run.preference()
    assert verbs(started.commands) == ["rm", "score", "sft", "infer", "infer", "dpo", "infer"]
    assert len(read_records(run.out / "pairs.jsonl")) == len(read_records(run.train))
    assert [pair["rejected"] for pair in read_records(run.out / "sampled_pairs.jsonl")] == ["no digit"] * 7
    heldout = str(run.heldout)
    assert not any(heldout in part for command in started.commands for part in command)  # data.eval of the files


def save_checkpoint(folder, **sizes):
    """A checkpoint whose tensors have so many numbers."""
    zeros = lambda first, last: torch.zeros(last - first)
    sources = [TensorToWrite(name, (size,), torch.float32, zeros) for name, size in sizes.items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, sources, {"step": 0})


def test_all_weights_are_tuned_unless_the_demo_did_that(out, started):
    run = tune.Tune(out)
    run.lora()
    assert verbs(started.commands) == ["sft", "infer", "sft", "infer"]
    assert run.full == run.out / "sft_answers"
    started.commands.clear()
    write_answers(out / "after", ["1"])
    run = tune.Tune(out)
    run.lora()
    assert verbs(started.commands) == ["sft", "infer"]
    assert run.full == out / "after"


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, None),
        ({"won": 0.94}, "reward"),
        ({"mediocre": 0.85}, "DPO"),
        ({"dpo": 0.85, "mediocre": 0.7}, None),
        ({"dpo": 0.84, "mediocre": 0.7}, "DPO"),
        ({"lora": 0.95}, "LoRA: right"),
        ({"weights": 50}, "LoRA: share"),
    ],
)
def test_each_bound_is_held(out, capsys, changed, missed):
    run = tune.Tune(out)
    expected = expected_answers(run.heldout)
    shares = {"won": 1.0, "mediocre": 0.7, "dpo": 0.9, "full": 0.98, "lora": 0.97, "weights": 49} | changed
    scores = []
    for i, right in enumerate(expected):
        scores += [(digit == int(right)) == (i < shares["won"] * len(expected)) for digit in range(10)]
    (run.out / "rm_scores").mkdir(parents=True)
    write_records(run.out / "rm_scores" / "scores.jsonl", ({"index": i, "score": s} for i, s in enumerate(scores)))
    folders = {name: run.out / f"{name}_answers" for name in ("mediocre", "dpo", "lora")} | {"full": run.full}
    for name, folder in folders.items():
        write_answers(folder, [right if i < shares[name] * len(expected) else "?" for i, right in enumerate(expected)])
    save_checkpoint(
        run.out / "lora" / "checkpoints" / "step_00000070", **{"adapter.a": shares["weights"], "optimizer.b": 99}
    )
    save_checkpoint(
        out / "stage3" / "checkpoints" / "step_00000006", **{"language.a": 900, "vision.b": 100, "optimizer.c": 99}
    )
    assert run.check() is (missed is None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert len(lines) == (missed is not None)
    assert not lines or missed in lines[0]
