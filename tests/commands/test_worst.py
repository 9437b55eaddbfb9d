"""`megavlm score --worst`: the samples with the highest loss per token, with their pictures and the loss of tokens."""

import json
import re

import pytest
from parity import Toys
from test_train_verbs import megavlm, sft_config
from toy import write_records


def test_the_highest_losses_come_first(tmp_path, tmp_path_factory):
    """Against scores.jsonl; a pair is two samples, and two samples have pictures."""
    toys = Toys(tmp_path_factory.mktemp("toys"))
    asked, answered = toys.records[0]["messages"][:2]
    pair = {"prompt": asked["content"], "chosen": answered["content"], "rejected": "Zebra zebra."}
    pair["images"] = toys.records[0]["images"]
    data = write_records(toys.root / "scored.jsonl", [*toys.records, pair])
    config, out = sft_config(toys, tmp_path), tmp_path / "out"
    told = megavlm("score", config, f"data.eval={data}", "--worst", 4, f"output={out}").stdout
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == len(toys.records) + 2
    expected = sorted(lines, key=lambda line: line["sum"] / line["tokens"])[:4]
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
    refused = megavlm("score", config, f"data.eval={data}", "--worst", 4, "--reward", other, status=2)
    assert "--worst with --reward would be ignored" in refused.stderr
