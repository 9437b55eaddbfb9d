"""Several rejected answers to a prompt: each makes a pair with the chosen one, which stands in its row once."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavlm.align.objectives import PairObjective, RewardObjective, pairs_of
from megavlm.align.reference import Reference, _Partial
from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.answer_groups import draft_unit, separate_answers
from megavlm.data.renderer import Renderer
from megavlm.sources.jsonl import JsonlFile

GROUPS = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1), tp=None)
RECORDS = [
    {"prompt": "Two and two?", "chosen": "Four.", "rejected": ["Five.", "Three, I think.", "No."], "margin": 0.5},
    {"prompt": "The sky?", "chosen": "Blue.", "rejected": "Green."},
    {
        "prompt": "Hello?",
        "chosen": "Yes!",
        "rejected": [[{"role": "assistant", "content": "No?"}], [{"role": "assistant", "content": "Who?"}]],
    },
]
PAIRS = [[0, 1], [0, 2], [0, 3], [4, 5], [6, 7], [6, 8]]


@pytest.fixture(scope="module")
def row(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    renderer = Renderer(model_folder, DataSettings(seq_length=512))
    file = JsonlFile(path)
    return renderer.complete_row([draft_unit(renderer, file, place, "pair") for place in range(3)])


def test_the_row_has_each_answer_once(row):
    assert row.num_samples == 9
    assert pairs_of(row).tolist() == PAIRS
    assert [answer.number for answer in row.annotations] == [0, 0, 1, 2, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("sft_weight", [0.0, 0.25])
def test_the_loss_is_the_sum_over_pairs(row, sft_weight, monkeypatch):
    """Of DPO by hand; the likelihood of each chosen answer counts once."""
    draw = torch.Generator().manual_seed(1)
    answers, reference = (-10 * torch.rand(9, generator=draw) - 1 for _ in range(2))
    objective = PairObjective("sigmoid", {"beta": 0.3}, 64, GROUPS, sft_weight=sft_weight)
    monkeypatch.setattr(objective, "answers", lambda outputs, micro_batch: outputs)
    outputs = answers.clone().requires_grad_()
    loss, sums = objective.loss(outputs, SimpleNamespace(host=row, found=reference))
    loss.backward()
    lengths = [int((labels != -100).sum()) for labels in row.labels.split(row.cu_seqlens.diff().tolist())][:9]
    theirs = answers.clone().requires_grad_()
    expected = sum(
        -torch.nn.functional.logsigmoid(0.3 * ((theirs[c] - reference[c]) - (theirs[j] - reference[j])))
        for c, j in PAIRS
    )
    for chosen in (0, 4, 6):
        expected = expected - sft_weight * theirs[chosen] / lengths[chosen]
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(outputs.grad, theirs.grad)
    assert objective.weight([row]) == 6
    fields = objective.fields(sums.tolist(), {"weight": 6})
    assert fields["logprobs/rejected"] == pytest.approx(sum(answers[j] for _, j in PAIRS).item() / 6)
    assert fields["pairs"] == 6


def test_a_reward_model_learns_from_every_pair(row):
    scores = torch.linspace(-1, 1, 9)
    objective = RewardObjective(0.01, GROUPS, sequence_parallel=False)
    loss, _ = objective.loss(scores, SimpleNamespace(host=row, found=None))
    margins = {0: 0.5, 4: 0.0, 6: 0.0}
    expected = sum(
        0.01 * (scores[c] + scores[j]) ** 2 - torch.log(torch.sigmoid(scores[c] - scores[j] - margins[c]))
        for c, j in PAIRS
    )
    torch.testing.assert_close(loss, expected)
    assert objective.weight([row]) == 6


def test_the_reference_has_a_column_for_each(row, tmp_path):
    known = _Partial(tmp_path / "reference.safetensors", {})
    known.tables = [np.full((3, 2), np.nan, dtype=np.float32)]
    columns = [0 if answer.side == "chosen" else 1 + answer.number for answer in row.annotations]
    known.add(
        [(0, index, column, -float(n)) for n, (index, column) in enumerate(zip(row.indices, columns, strict=True))]
    )
    assert known.tables[0].shape == (3, 4)
    row.source_ids = [0] * 9
    (attached,) = Reference(known.tables).attach(iter([row]))
    assert [answer.ref_logprob for answer in attached.annotations] == [-float(n) for n in range(9)]


def test_scoring_refuses_them():
    with pytest.raises(UserError, match="several rejected answers are only for training"):
        separate_answers(RECORDS[0], "file:1")
    assert [side for side, _ in separate_answers(RECORDS[1], "file:2")] == ["chosen", "rejected"]
