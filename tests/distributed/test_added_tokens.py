"""Tokens that were added to the tokenizer: refused, or rows for them with ``model.resize_vocabulary``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parity import Toys, train_reference, weights_of
from test_scores import largest_difference, reference_scores, run_score, score_settings
from toy import reference_model, write_records

from megavlm.base.errors import UserError

NEW, ROWS = 40, 640  # tokens that are added; rows that they need: the toy has 512


@pytest.fixture(scope="module")
def grown(toys: Toys):
    """By kind of model: a folder whose tokenizer has more ids than the model has rows, and transformers' own answer.

    The second folder is the same model with its tables enlarged by hand: new rows are the mean of the old ones.
    """

    def make(kind: str) -> tuple[Path, Path]:
        from transformers import AutoTokenizer

        folder, reference = toys.root / f"added-{kind}", toys.root / f"added-{kind}-by-hand"
        if not folder.exists():
            shutil.copytree(toys.folder(kind), folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_tokens([f"<|new {i}|>" for i in range(512 + NEW - len(tokenizer))])
            tokenizer.save_pretrained(folder)
            model = reference_model(folder)
            old = {id(table): table.weight.data for table in (model.get_input_embeddings(), model.lm_head)}
            model.resize_token_embeddings(ROWS, mean_resizing=False)
            for table, before in zip((model.get_input_embeddings(), model.lm_head), old.values(), strict=True):
                table.weight.data[:512], table.weight.data[512:] = before, before.double().mean(0).float()
            model.config.text_config.vocab_size = ROWS
            shutil.copytree(folder, reference)
            model.save_pretrained(reference)
        return folder, reference

    return make


@pytest.fixture(scope="module")
def records(toys: Toys) -> list[dict]:
    """Two samples with new tokens, of which some are targets."""
    say = lambda role, content: {"role": role, "content": content}
    return [
        {"messages": [say("user", "What is <|new 3|>?"), say("assistant", "It is <|new 30|> and <|new 3|>.")]},
        {"messages": [say("user", "<image>What?"), say("assistant", "<|new 30|>!")], "images": ["chelsea-96x64.png"]},
    ]


def run_sft(settings: dict) -> int:
    from megavlm.commands import train
    from megavlm.config.settings import Settings

    return train.main(Settings(**settings), "sft")


def export(settings: dict, out: Path) -> None:
    from megavlm.commands import export
    from megavlm.config.settings import Settings

    export.main(Settings(**settings), out)


def scores_in(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "size", "parallel"), [("dense-untied", 2, {"tensor": 2}), ("dense", 1, {})], ids=["untied, TP2", "tied"]
)
def test_new_rows_are_the_mean_of_the_old(kind, size, parallel, grown, records, toys, tmp_path, request):
    folder, reference = grown(kind)
    data = write_records(toys.root / "added.jsonl", records)
    settings = score_settings(folder, toys.checkpoint(kind), data, tmp_path, parallel)
    settings["model"]["resize_vocabulary"] = True
    assert request.getfixturevalue(f"world{size}").run(run_score, settings) == [0] * size
    expected = reference_scores(reference, records, toys.root)
    assert largest_difference(scores_in(tmp_path), expected) < 1e-4


def test_a_resized_model_is_trained_resumed_scored_and_exported(grown, records, toys, tmp_path, world1, world2):
    from transformers import AutoConfig

    folder, reference = grown("dense")
    data = write_records(toys.root / "added.jsonl", records)
    run = tmp_path / "run"
    settings = {
        "model": {"hf": str(folder), "load": str(toys.checkpoint("dense")), "resize_vocabulary": True},
        "data": {"train": str(data), "seq_length": 128, "packing": "none", "shuffle": False, "workers": 0},
        "train": {
            "precision": "fp32", "optimizer": "sgd", "lr": 0.2, "schedule": "constant", "steps": 1,
            "global_batch_size": 2, "clip_grad": 0.0, "weight_decay": 0.0, "memory_check": False,
        },
        "log": {"wandb": {"mode": "off"}},
        "output": str(run),
    }  # fmt: skip
    assert world2.run(run_sft, {**settings, "parallel": {"tensor": 2}}) == [0, 0]
    trained = train_reference(reference, records, toys.root, lr=0.2, steps=1)
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(trained.steps[0][0], rel=1e-5)
    after = weights_of(run / "checkpoints" / "step_00000001", reference)
    for name, value in after.items():
        torch.testing.assert_close(value, trained.weights[name], rtol=1e-4, atol=1e-5)

    settings["train"]["steps"] = 2
    assert world1.run(run_sft, settings) == [0]  # goes on in another layout
    trained = train_reference(reference, records, toys.root, lr=0.2, steps=2)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == pytest.approx(
        trained.steps[1][0], rel=1e-5
    )
    settings["model"]["load"] = str(run)
    scoring = score_settings(folder, run, data, tmp_path / "scores")
    scoring["model"]["resize_vocabulary"] = True
    assert world1.run(run_score, scoring) == [0]
    export({"model": settings["model"]}, tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").text_config.vocab_size == ROWS
    exported = reference_scores(tmp_path / "hf", records, toys.root)
    assert largest_difference(scores_in(tmp_path / "scores"), exported) < 1e-4

    settings["model"]["resize_vocabulary"] = False
    with pytest.raises(UserError, match=r"tokenizer of .* ids up to 551, .* only 512 rows"):
        export({"model": settings["model"]}, tmp_path / "not")
