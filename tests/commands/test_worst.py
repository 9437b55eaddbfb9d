"""`megavlm score --worst`: the samples with the highest loss per token, with their pictures and the loss of tokens."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from parity import Toys
from test_train_verbs import megavlm, sft_config
from toy import write_records

from megavlm.inspection.worst import worst_of
from megavlm.runtime.scoring import IGNORE, sample_scores


def test_the_highest_losses_come_first(tmp_path, tmp_path_factory):
    """Against scores.jsonl; a pair is two samples, and two samples have pictures."""
    toys = Toys(tmp_path_factory.mktemp("toys"))
    asked, answered = toys.records[0]["messages"][:2]
    pair = {"prompt": asked["content"], "chosen": answered["content"], "rejected": "Zebra zebra."}
    pair["images"] = toys.records[0]["images"]
    data = write_records(toys.root / "scored.jsonl", [*toys.records, pair])
    config, out = sft_config(toys, tmp_path), tmp_path / "out"
    told = megavlm("score", config, f"data.eval={data}", "--worst", 4, "--each", f"output={out}").stdout
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == len(toys.records) + 2
    expected = sorted(lines, key=lambda line: line["sum"] / line["tokens"])[:4]
    assert [line["loss"] for line in lines] == [-sum(line["logprobs"]) / len(line["logprobs"]) for line in lines]
    each = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    fields = ("index", "sample", "side", "loss", "tokens")
    short = [{name: line[name] for name in fields if name in line} for line in lines]
    assert each == sorted(short, key=lambda line: -line["loss"])
    assert [line.get("side") for line in lines[-2:]] == ["chosen", "rejected"]
    _, _, shown = told.partition("highest loss per token:\n")
    words = [f"{-line['sum'] / line['tokens']:8.4f}  {line['sample']}" for line in expected]
    assert [a.startswith(b) for a, b in zip(shown.splitlines(), words, strict=False)] == [True] * 4
    page = (out / "scores.html").read_text()
    cards = page.split("<article")[1:]
    assert [line["sample"] in card for line, card in zip(expected, cards, strict=True)] == [True] * 4
    for line, card in zip(expected, cards, strict=True):
        losses = [float(loss) for loss in re.findall(r"loss (\d[\d.e+-]*)", card.partition('<div class="tokens">')[2])]
        assert losses == pytest.approx([-logprob for logprob in line["logprobs"]], rel=1e-3)  # shown with four digits
        assert ("<img" in card) == bool(line["media"])
    other = f"output={tmp_path / 'other'}"
    for flags in (("--worst", 4), ("--each",)):
        refused = megavlm("score", config, f"data.eval={data}", *flags, "--reward", other, status=2)
        assert f"{flags[0]} with --reward would be ignored" in refused.stderr


def test_a_sample_without_targets_has_no_loss():
    row = SimpleNamespace(segment_lengths=[2, 1], labels=torch.tensor([7, 8, IGNORE]), indices=[3, 4])
    with_targets, without = sample_scores(row, torch.tensor([-1.0, -2.0, 0.0]))
    assert with_targets == {"index": 3, "logprobs": [-1.0, -2.0], "sum": -3.0, "tokens": 2, "loss": 1.5}
    assert without == {"index": 4, "logprobs": [], "sum": 0, "tokens": 0, "loss": None}
    assert [line["index"] for line in worst_of([without, with_targets])] == [3]
