"""Evaluation while training: the held-out loss is that of `score`, training keeps its bits, the best is kept."""

import json
from pathlib import Path
from unittest import mock

import pytest
from parity import VARYING, settings_of
from test_preference import answered, judged_of, pairs_of
from test_scores import run_score, score_settings
from toy import write_records

# name: (processes, toy model, parallel settings)
LAYOUTS = {
    "one process": (1, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "DP2": (2, "dense", {}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}
PARTS = {"first": slice(0, 5), "last": slice(5, 8)}  # the toy's records in two held-out files


def train(settings: dict, method: str = "sft") -> str:
    """Runs on every rank: a training verb. Returns the message with which it ends, or ""."""
    from megavlm.base.errors import UserError
    from megavlm.commands import train as verb
    from megavlm.config.settings import Settings

    with mock.patch.object(verb, "_report", lambda run, step, say: None):
        try:
            verb.main(Settings(**settings), method)
        except UserError as error:
            return error.message
    return ""


@pytest.fixture(scope="module")
def held_out(toys) -> list[dict]:
    """Two sources of data.eval."""
    return [
        {"path": str(write_records(toys.root / f"{name}.jsonl", toys.records[part]))} for name, part in PARTS.items()
    ]


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


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_held_out_loss_is_that_of_score(layout, settings, scored, tmp_path, request):
    processes, kind, parallel = LAYOUTS[layout]
    made = settings(kind, parallel, lr=1e-30)  # too little to change a weight, so that all layouts have the same score
    assert request.getfixturevalue(f"world{processes}").run(train, made) == [""] * processes
    (line,) = lines_of(tmp_path / "run/metrics.jsonl")
    expected = scored(kind)
    print(f"\n| {layout} | {max(abs(line[name] / value - 1) for name, value in expected.items()):.1e} |")
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-6)  # some 80 log-probabilities near -10, each to a few 1e-7
