"""Answers to held-out questions while training: those of `infer`, their scores, and nothing else changes."""

import json
from pathlib import Path

import pytest
from grpo_rewards import letters
from parity import mostly_slow, settings_of
from test_evaluation import PARTS, lines_of, nothing, train, without
from test_generate import run_infer
from toy import write_records

SCORER = f"{Path(__file__).parent / 'grpo_rewards.py'}:letters"  # gives the answers of a toy, no words, some order
ASKED, TOKENS = 3, 5  # questions of each source, and tokens of an answer
# name: (processes, toy model, parallel settings)
LAYOUTS = {
    "one process": (1, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "DP2": (2, "dense", {}),
    "MoE EP2": (2, "moe", {"expert": 2}),
    "MoE TP2 PP2 EP2": (4, "moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
    "CP2 PP2": (4, "dense", {"context": 2, "pipeline": 2}),
}


@pytest.fixture
def settings(toys, tmp_path, held_out):
    """settings(kind, parallel, steps, evaluation, …): those of a run on the toy's records that asks its questions."""

    def settings(kind="dense", parallel=None, steps=1, evaluation=None, **train):
        made = settings_of(toys.folder(kind), parallel or {}, steps=steps, memory_check=False, **train)
        made["model"]["load"] = str(toys.checkpoint(kind))
        file = write_records(toys.root / "train.jsonl", toys.records)
        made["data"] |= {"train": str(file), "workers": 0, "eval": held_out}
        answers = {"samples": ASKED, "scorer": SCORER, "max_new_tokens": TOKENS}
        made |= {"eval": {"every": 1, "rows": 1, "answers": answers, **(evaluation or {})}}
        made |= {"output": str(tmp_path / "run"), "log": {"wandb": {"mode": "off"}}}
        return made

    return settings


@pytest.fixture(scope="module")
def inferred(toys, held_out, world1, tmp_path_factory):
    """inferred(kind): the first answers of `megavlm infer` to each source, in one process."""
    known: dict[str, dict[str, list[str]]] = {}

    def inferred(kind):
        if kind not in known:
            made = {
                "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
                "data": {"eval": held_out, "workers": 0},
                "train": {"precision": "fp32"},
                "generate": {"max_new_tokens": TOKENS},
                "output": str(tmp_path_factory.mktemp("answers")),
            }
            assert world1.run(run_infer, made) == [0]
            texts = [line["answer"] for line in lines_of(Path(made["output"]) / "answers.jsonl")]
            known[kind] = {name: texts[part][:ASKED] for name, part in PARTS.items()}
        return known[kind]

    return inferred


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, lambda layout: layout in ("CP2", "MoE EP2")))
def test_the_answers_are_those_of_infer(layout, settings, inferred, tmp_path, request):
    processes, kind, parallel = LAYOUTS[layout]
    made = settings(kind, parallel, lr=1e-30)  # too little to change a weight
    assert request.getfixturevalue(f"world{processes}").run(train, made) == [""] * processes
    lines, texts = lines_of(tmp_path / "run/metrics.jsonl"), inferred(kind)
    assert [line["step"] for line in lines] == [0, 1]
    scores = {name: letters(found) for name, found in texts.items()}
    assert len({score for found in scores.values() for score in found}) > 2  # the answers matter
    expected = {f"eval/{name}/answers/score": sum(found) / ASKED for name, found in scores.items()}
    expected["eval/answers/score"] = sum(map(sum, scores.values())) / (ASKED * len(scores))
    for line in lines:
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-12)  # the order of the sum
        assert 1 <= line["eval/answers/length"] <= TOKENS
    steps = [json.loads(line) for line in (tmp_path / "run/held_out_answers.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps] == [0, 1]
    rewards = [group["answers"][0]["reward"] for group in steps[1]["groups"]]
    assert rewards == pytest.approx([score for found in scores.values() for score in found])
    assert [len(group["media"]) for group in steps[1]["groups"]] != [0] * len(rewards)


def test_a_run_that_is_continued_asks_and_answers_the_same(settings, world1, tmp_path):
    found = {}
    for name, starts in {"straight": (4,), "resumed": (2, 4)}.items():
        for steps in starts:
            made = settings(steps=steps, evaluation={"every": 2, "best": "eval/answers/score"}, lr=0.5)
            made |= {"output": str(tmp_path / name), "checkpoint": {"keep": 1}}
            assert world1.run(train, made) == [""]
        lines = lines_of(tmp_path / name / "metrics.jsonl")
        found[name] = without(lines), (tmp_path / name / "held_out_answers.jsonl").read_text()
    assert found["straight"] == found["resumed"]
    scores = {line["step"]: line["eval/answers/score"] for line in lines if "eval/answers/score" in line}
    assert list(scores) == [0, 2, 4]
    assert len(set(scores.values())) > 1  # so large a learning rate changes the answers
    best = max((2, 4), key=lambda step: scores[step])  # there is no checkpoint of step 0
    assert (tmp_path / "straight/checkpoints/best").readlink() == Path(f"step_{best:08}")


def memory_left(settings: dict, name: str) -> list[int]:
    """Runs on every rank: by how many bytes of tensors each evaluation by the class ``name`` has raised the memory."""
    import gc
    from unittest import mock

    import torch

    from megavlm.config.settings import Settings
    from megavlm.evaluation.answers import HeldOutAnswers
    from megavlm.evaluation.held_out import HeldOut

    evaluation = {one.__name__: one for one in (HeldOut, HeldOutAnswers)}[name]
    sizes, real = [], evaluation.__call__

    def size() -> int:
        gc.collect()
        storages = (
            one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)
        )
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())  # of views of it, only once

    def measured(self, run, step, say):
        before = size()
        fields = real(self, run, step, say)
        sizes.append(size() - before)
        return fields

    from megavlm.commands import train as verb

    with (
        mock.patch.object(evaluation, "__call__", measured),
        mock.patch.multiple(verb._Reports, at_checkpoint=nothing, at_end=nothing),
    ):
        verb.main(Settings(**settings), "sft")
    return sizes


@pytest.mark.parametrize("name", ["HeldOut", "HeldOutAnswers"])
def test_an_evaluation_leaves_no_memory_behind(name, settings, world1):
    """The first one keeps the questions, or the rows, which are in host memory also on a GPU.

    What others have left in this process may be freed meanwhile.
    """
    ((first, *others),) = world1.run(memory_left, settings(steps=2), name)
    assert first > 0
    assert max(others) <= 0, others


def test_bad_scorers_and_questions_are_told(settings, toys, world2, tmp_path, capsys):
    """A broken question, an answer without a score; a scorer that cannot be loaded ends all ranks."""
    records = [{"messages": 1}, *toys.records[:2]]
    asked = write_records(toys.root / "asked.jsonl", records)
    made = settings(evaluation={"answers": {"samples": 3, "scorer": ["exact", "format"]}})
    made["data"]["eval"] = str(asked)
    assert world2.run(train, made) == ["", ""]
    told = capsys.readouterr().out
    assert f"eval.answers: 1 sample cannot be asked; the first is {asked}:1" in told
    line = lines_of(tmp_path / "run/metrics.jsonl")[-1]
    assert [line[f"eval/answers/score{name}"] for name in ("", "/exact", "/format")] == [0.0, 0.0, 0.0]
    made = settings(evaluation={"answers": {"samples": 3, "scorer": [{"name": "choice", "field": "letter"}]}})
    made["output"] = str(tmp_path / "none")
    assert world2.run(train, made) == ["", ""]
    told = capsys.readouterr().out
    assert "eval.answers: 6 of 6 answers have no score; the first is that to" in told
    assert lines_of(tmp_path / "none/metrics.jsonl")[-1]["eval/answers/score"] is None
    broken = tmp_path / "broken.py"
    broken.write_text("def judge(completions, **columns):\n    return [1.0]\n")
    made = settings(evaluation={"answers": {"samples": 3, "scorer": f"{broken}:jugde"}})
    made["output"] = str(tmp_path / "unloadable")
    ends = world2.run(train, made)
    assert len(set(ends)) == 1
    assert "jugde" in ends[0]


@pytest.mark.parametrize("method", mostly_slow(["grpo", "ppo"], lambda method: method == "grpo"))
def test_reinforcement_learning_measures_its_own_rewards(method, settings, inferred, world1, tmp_path):
    """Of two rewards, one is only reported. Training has the bits of a run that does not evaluate."""
    made = settings(steps=2, evaluation={"every": 2, "rows": None, "answers": {}}, optimizer="adam", lr=1e-3)
    del made["train"]["global_batch_size"]
    rewards = [{"python": SCORER}, {"name": "exact", "weight": 0.0}]
    made |= {"reward": rewards, "rollout": {"prompts": 2, "group_size": 2, "max_new_tokens": TOKENS}}
    found = {}
    for name in ("with", "without"):
        made["output"] = str(tmp_path / name)
        made["eval"] = made["eval"] if name == "with" else {}
        assert world1.run(train, made, method) == [""]
        lines = found[name] = lines_of(tmp_path / name / "metrics.jsonl")
    start, *lines = found["with"]
    assert [without([line], "eval/") for line in lines] == [without([line]) for line in found["without"]]
    assert ["eval/answers/score" in line for line in lines] == [False, True]
    texts = inferred("dense")
    for source in PARTS:  # all questions of a source, of which the first are known here
        assert start[f"eval/{source}/answers/score"] == start[f"eval/{source}/answers/score/letters"]
    held = json.loads((tmp_path / "with/held_out_answers.jsonl").read_text().splitlines()[0])["groups"]
    rewards = [group["answers"][0]["reward"] for group in held[:ASKED]]
    assert rewards == pytest.approx(letters(texts["first"]))


def test_an_evaluation_after_each_epoch(settings, world1, tmp_path):
    """Eight samples, one in a row and four rows in a step: an epoch takes two steps."""
    made = settings(steps=5, evaluation={"every": None, "every_epochs": 1, "answers": {}})
    made["data"] |= {"packing": "none", "seq_length": 512}
    assert world1.run(train, made) == [""]
    steps = [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl") if "eval/loss" in line]
    assert steps == [0, 2, 4, 5]


def test_the_best_link_is_mended_when_a_run_is_continued(settings, world1, tmp_path, capsys):
    """Other held-out data: the link stays and this is said. A checkpoint that cannot be read: the link goes."""
    root = tmp_path / "run/checkpoints"
    evaluation = {"best": "eval/loss", "answers": {}}
    made = settings(steps=1, evaluation=evaluation) | {"checkpoint": {"keep": 5}}
    assert world1.run(train, made) == [""]
    assert (root / "best").readlink() == Path("step_00000001")
    made = settings(steps=2, evaluation=evaluation | {"rows": None}) | {"checkpoint": {"keep": 5}}
    capsys.readouterr()
    assert world1.run(train, made) == [""]
    assert "checkpoints/best leads to step 1 until the next evaluation" in capsys.readouterr().out
    assert (root / "best").readlink() == Path("step_00000002")
    next(root.glob("step_00000002/*.distcp")).write_bytes(b"")
    made["train"]["steps"] = 2
    assert world1.run(train, made) == [""]
    told = capsys.readouterr().out
    assert "checkpoints/best is gone until the next evaluation: step_00000002 is done again" in told
    assert (root / "best").readlink() == Path("step_00000002")  # of the step that was done again
