"""Evaluation while training: the held-out loss is that of `score`, training keeps its bits, the best is kept."""

import itertools
import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from parity import VARYING, mostly_slow, settings_of
from test_layouts import LAYOUTS as TRAINED
from test_layouts import VARIANTS
from test_preference import judged_of, pairs_of
from test_scores import run_score, score_settings
from toy import write_records

# name: (processes, toy model, parallel settings, other settings): every layout of the table of docs/parity.md
LAYOUTS = {name: (*layout, {}) for name, layout in TRAINED.items()} | VARIANTS
LAYOUTS["TP2 × DP2"] = (4, "dense", {"tensor": 2}, {})
PARTS = {"first": slice(0, 5), "last": slice(5, 8)}  # the toy's records in two held-out files


def nothing(*_: object) -> None:
    """In the place of a report, which takes seconds, and those at checkpoints in processes of their own."""


def draw(*_: object) -> list:
    """In the place of ``look_ahead`` of an objective: one that draws random numbers, as none does yet."""
    random.random(), np.random.rand(), torch.rand(1)
    return []


def train(settings: dict, method: str = "sft") -> str:
    """Runs on every rank: a training verb. Returns the message with which it ends, or ""."""
    from megavlm.base.errors import UserError
    from megavlm.commands import train as verb
    from megavlm.config.settings import Settings
    from megavlm.evaluation.plain_loss import PlainLoss

    without_reports = mock.patch.multiple(verb._Reports, at_checkpoint=nothing, at_end=nothing)
    with without_reports, mock.patch.object(PlainLoss, "look_ahead", draw):
        try:
            verb.main(Settings(**settings), method)
        except UserError as error:
            return error.message
    return ""


@pytest.fixture
def settings(toys, tmp_path, held_out):
    """settings(kind, parallel, steps, eval, …): those of a run on the toy's records, and its data.eval."""

    def settings(kind="dense", parallel=None, steps=1, evaluation=None, data=None, **train):
        made = settings_of(toys.folder(kind), parallel or {}, steps=steps, memory_check=False, **train)
        made["model"]["load"] = str(toys.checkpoint(kind))
        file = write_records(toys.root / "train.jsonl", toys.records)
        made["data"] |= {"train": str(file), "workers": 0, "eval": held_out, **(data or {})}
        made |= {"eval": {"every": 1} if evaluation is None else evaluation}
        made |= {"output": str(tmp_path / "run"), "log": {"wandb": {"mode": "off"}}}
        return made

    return settings


@pytest.fixture(scope="module")
def scored(toys, held_out, world1, tmp_path_factory):
    """scored(kind): the mean loss of each held-out source and of both by `megavlm score`, in one process."""
    known: dict[str, dict[str, float]] = {}

    def scored(kind):
        if kind not in known:
            out = tmp_path_factory.mktemp("scores")
            made = score_settings(toys.folder(kind), toys.checkpoint(kind), None, out)
            made["data"]["eval"] = held_out
            assert world1.run(run_score, made) == [0]
            lines = lines_of(out / "scores.jsonl")
            assert [line["index"] for line in lines] == list(range(8))
            of = {name: lines[part] for name, part in PARTS.items()} | {"": lines}
            known[kind] = {
                "/".join(filter(None, ("eval", name, "loss"))): -sum(line["sum"] for line in some)
                / sum(line["tokens"] for line in some)
                for name, some in of.items()
            }
        return known[kind]

    return scored


def without(lines: list[dict], *prefixes: str) -> list[dict]:
    """Lines of metrics without what tells of the machine, and without fields that begin with these prefixes."""
    return [{k: v for k, v in line.items() if k not in VARYING and not k.startswith(prefixes)} for line in lines]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


QUICK = ("one process", "PP2", "MoE EP2", "TP2 × CP2")


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, lambda layout: layout in QUICK))
def test_the_held_out_loss_is_that_of_score(layout, settings, scored, tmp_path, request):
    processes, kind, parallel, others = LAYOUTS[layout]
    made = settings(
        kind, parallel, lr=1e-30, **others
    )  # too little to change a weight, so that all layouts have the same score
    assert request.getfixturevalue(f"world{processes}").run(train, made) == [""] * processes
    lines = lines_of(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    expected = scored(kind)
    print(f"\n| {layout} | {max(abs(lines[1][name] / value - 1) for name, value in expected.items()):.1e} |")
    for line, (name, value) in itertools.product(lines, expected.items()):
        assert line[name] == pytest.approx(value, rel=1e-6)  # some 80 log-probabilities near -10, each to a few 1e-7


# method: (layout, settings of align)
COMPARED = {
    "sft": ("one process", {}),
    "dpo": ("PP2", {"loss": "sigmoid", "beta": 0.3}),
    "dpo, reference in each step": ("one process", {"loss": "hinge", "reference_at": "step"}),
    "kto": ("DP2", {"reference_at": "step"}),
    "rm": ("TP2", {"centering": 0.1}),
}


@pytest.mark.parametrize("name", mostly_slow(COMPARED, lambda name: name in ("dpo", "kto")))
def test_held_out_data_that_is_trained_on_has_the_loss_of_the_next_step(name, settings, toys, tmp_path, request):
    """Each step has all samples, so an evaluation sees what the next step sees, with the same weights."""
    method, (layout, align) = name[:3], COMPARED[name]
    processes, kind, parallel, _ = LAYOUTS[layout]
    pairs = pairs_of(toys.records)
    records = {"sft": toys.records, "kto": judged_of(pairs)}.get(method, pairs)
    file = str(write_records(toys.root / f"{method}-all.jsonl", records))
    data = {"train": file, "eval": file, "packing": "none", "shuffle": False, "seq_length": 512}
    made = settings(kind, parallel, 3, {"every": 1}, data, global_batch_size=8, lr=0.2) | {"align": align}
    assert request.getfixturevalue(f"world{processes}").run(train, made, method) == [""] * processes
    lines = lines_of(tmp_path / "run/metrics.jsonl")
    assert len({line["loss"] for line in lines[1:]}) == 3
    for line, after in itertools.pairwise(lines):
        for field in ("loss", "accuracy", "margin"):
            if field in after:
                assert line[f"eval/{field}"] == pytest.approx(after[field], rel=1e-5, abs=1e-6)
    assert ("eval/margin" in lines[0]) == (method != "sft")


def test_a_rank_without_a_row_adds_nothing(settings, toys, world1, world2, tmp_path):
    """Three pairs on two ranks: the second computes a filling row beside the third."""
    file = str(write_records(toys.root / "three.jsonl", pairs_of(toys.records)[:3]))
    data = {"train": file, "eval": file, "packing": "none", "seq_length": 512}
    found = []
    for number, world in enumerate((world1, world2)):
        made = settings(data=data, lr=1e-30) | {"align": {"loss": "simpo"}, "output": str(tmp_path / str(number))}
        assert set(world.run(train, made, "dpo")) == {""}
        found.append(lines_of(tmp_path / str(number) / "metrics.jsonl")[1])
    for field in ("loss", "accuracy", "margin"):
        assert found[1][f"eval/{field}"] == pytest.approx(found[0][f"eval/{field}"], rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "workers"),
    mostly_slow(
        [("one process", 0), ("one process", 1), ("DP2", 1), ("TP2", 0), ("PP2 × VPP2", 0), ("CP2", 0), ("MoE EP2", 0)],
        lambda case: case == ("one process", 0),
    ),
)
def test_training_has_the_bits_of_a_run_that_does_not_evaluate(layout, workers, settings, tmp_path, request):
    """Dropout included, whose random numbers an evaluation must not use; adapters of experts have none."""
    processes, kind, parallel, _ = LAYOUTS[layout]
    lora = {"adapter": {"type": "lora", "rank": 4, "dropout": 0.3 if kind == "dense" else 0.0}}
    found = {}
    answers = {"samples": 2, "scorer": "exact", "max_new_tokens": 4}
    for name, evaluation in {"with": {"every": 2, "rows": 1, "answers": answers}, "without": {}}.items():
        made = settings(kind, parallel, 4, evaluation, {"workers": workers}, optimizer="adam", lr=0.01) | lora
        made["output"] = str(tmp_path / name)
        assert request.getfixturevalue(f"world{processes}").run(train, made) == [""] * processes
        found[name] = lines_of(tmp_path / name / "metrics.jsonl")
    assert ["eval/loss" in line for line in found["with"]] == [True, False, True, False, True]  # from step 0 on
    assert ["eval/answers/score" in line for line in found["with"]] == [True, False, True, False, True]
    assert without(found["with"][1:], "eval/") == without(found["without"])


def test_the_best_is_kept_and_the_run_ends_early(settings, toys, held_out, world1, tmp_path, capsys):
    """Interrupted in the middle as well, with the same end; a start after that says so again."""
    evaluation = {"every": 1, "best": "eval/first/loss", "stop_after": 2}
    made = settings(steps=12, evaluation=evaluation, lr=0.5) | {"checkpoint": {"keep": 1, "every": 100}}
    folders = {}
    for name, starts in {"straight": (12, 12), "resumed": (3, 12)}.items():
        made["output"], told = str(tmp_path / name), []
        for steps in starts:
            made["train"]["steps"] = steps
            assert world1.run(train, made) == [""]
            told.append(capsys.readouterr().out)
        lines = lines_of(tmp_path / name / "metrics.jsonl")
        start, *lines = lines
        losses = [line["eval/first/loss"] for line in lines]
        best = losses.index(min(losses)) + 1
        assert start["eval/first/loss"] not in losses
        assert len(losses) == best + 2  # the learning rate is so large that the loss goes up and down
        end = f"stopped early at step {len(losses)}: eval/first/loss has not improved in 2 evaluations"
        assert [end in words for words in told] == [name == "straight", True]
        assert f"step {best} has the best eval/first/loss {losses[best - 1]:.4g} so far" in told[0]
        kept = {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        assert kept == {f"step_{best:08}", f"step_{len(losses):08}", "best"}
        assert (tmp_path / name / "checkpoints/best").readlink() == Path(f"step_{best:08}")
        folders[name] = without(lines)
        again = "eval.stop_after has ended this run already" if name == "straight" else "continued after step 3"
        assert again in told[1]
    assert folders["resumed"] == folders["straight"]

    scores = score_settings(toys.folder("dense"), tmp_path / "straight/checkpoints/best", None, tmp_path / "scores")
    scores["data"]["eval"] = [held_out[0]]
    assert world1.run(run_score, scores) == [0]
    lines = lines_of(tmp_path / "scores/scores.jsonl")
    loss = -sum(line["sum"] for line in lines) / sum(line["tokens"] for line in lines)
    assert loss == pytest.approx(min(losses), rel=1e-6)
    told = capsys.readouterr().out
    assert f"step {best} of {tmp_path / 'straight'}" in told
    assert f"its best by eval/first/loss: {min(losses):.4g}" in told


def test_held_out_data_that_cannot_be_used_ends_the_run_before_its_first_step(settings, world2, tmp_path, capsys):
    """On all ranks. A single broken sample is told and passed over."""
    bad = write_records(tmp_path / "bad.jsonl", [{"messages": 1}] * 3)
    made = settings(data={"eval": str(bad)})
    ends = world2.run(train, made)
    assert len(set(ends)) == 1
    assert "data.eval, source bad" in ends[0]
    assert "none of its samples can be used; the first is" in ends[0]
    assert not lines_of(tmp_path / "run/metrics.jsonl")
    some = write_records(tmp_path / "some.jsonl", [{"text": "one two three"}, {"messages": 1}, {"text": "four"}])
    assert world2.run(train, settings(data={"eval": str(some)})) == ["", ""]
    assert f"data.eval: 1 sample cannot be used; the first is {some}:2" in capsys.readouterr().out
    line = lines_of(tmp_path / "run/metrics.jsonl")[1]
    assert line["eval/loss"] > 0
    # no step is lost if data.eval cannot be used any more
    ends = world2.run(train, settings(steps=3, data={"eval": str(bad)}))
    assert all("none of its samples can be used" in end for end in ends)
    assert [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()


def rows_of(folder: str, files: list[str], data: dict, size: int) -> list[list[list[int]]]:
    """The numbers of the samples in each row, on each data-parallel rank."""
    from megavlm.config.settings import DataSettings
    from megavlm.data.renderer import Renderer
    from megavlm.evaluation.held_out_rows import HeldOutSource
    from megavlm.sources.blend import open_eval_sources

    settings = DataSettings(eval=files, **data)
    renderer, sources = Renderer(folder, settings), open_eval_sources(settings)
    found = []
    for rank in range(size):
        source = HeldOutSource(sources, renderer, "tune", settings, 3, rank, size, Path(folder))
        found.append([row.indices for row in source.rows(0)])
        assert [row.indices for row in source.rows(0)] == found[-1]  # now from memory
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_same_on_any_number_of_ranks(workers, toys, held_out):
    data = {"seq_length": 256, "workers": workers}
    file = [{"path": str(write_records(toys.root / "train.jsonl", toys.records))}]
    ((*whole,),) = rows_of(str(toys.folder("dense")), file, data, 1)
    assert whole[0][0] == 0
    assert [index for row in whole for index in row] == list(range(sum(map(len, whole))))
    assert len(whole) == 3  # eval.rows
    for size in (2, 3):
        ranks = rows_of(str(toys.folder("dense")), file, data, size)
        assert [ranks[number % size][number // size] for number in range(3)] == whole


def test_score_of_pairs_tells_accuracy_and_margin(toys, world1, tmp_path, capsys):
    pairs = write_records(toys.root / "scored-pairs.jsonl", pairs_of(toys.records)[:5])
    scores = score_settings(toys.folder("dense"), toys.checkpoint("dense"), pairs, tmp_path)
    assert world1.run(run_score, scores) == [0]
    lines = lines_of(tmp_path / "scores.jsonl")
    assert [line["side"] for line in lines] == ["chosen", "rejected"] * 5
    margins = [chosen["sum"] - rejected["sum"] for chosen, rejected in zip(lines[::2], lines[1::2], strict=True)]
    won = sum(margin > 0 for margin in margins)  # of five pairs never half
    words = f"the chosen answer has the higher log-probability in {won} of 5 pairs ({won / 5:.1%}), mean margin"
    assert f"{words} {sum(margins) / 5:.4f}" in " ".join(capsys.readouterr().out.split())
