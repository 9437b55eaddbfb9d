"""`megavlm infer` and `score` after an interruption, and on ranks that have nothing to compute."""

import json

import pytest
from pool import RankError
from test_generate import answers_of, questions_of, run_infer
from test_scores import run_score, score_settings
from toy import write_records

BROKEN = {"messages": "none"}


def run_some(settings: dict, prompts: int) -> int:
    """infer that is interrupted before prompt number ``prompts`` + 1; returns the number of prompts that it began."""
    from megavlm.rollout.rows import RowMaker

    original, count = RowMaker._encoded, 0

    def counted(self, new, width):
        nonlocal count
        count += len(new)
        if count > prompts:
            raise RuntimeError("the power is gone")
        return original(self, new, width)

    RowMaker._encoded = counted
    try:
        run_infer(settings)
    finally:
        RowMaker._encoded = original
    return count


@pytest.fixture
def asked(toys, tmp_path):
    """Settings of infer, one question at a time, sampled, with two samples that cannot be used."""
    records = questions_of(toys.records)
    data = write_records(toys.root / "continued.jsonl", [records[0], BROKEN, *records[1:4], BROKEN])
    return {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"eval": str(data), "workers": 0},
        "train": {"precision": "fp32"},
        "generate": {"max_new_tokens": 4, "batch_size": 2, "samples": 2, "temperature": 1.0},
        "output": str(tmp_path / "out"),
    }


def test_an_interrupted_run_continues_where_it_stopped(asked, tmp_path, world1, capfd):
    whole = {**asked, "output": str(tmp_path / "whole")}
    assert world1.run(run_some, whole, 9) == [4]
    out, partial = tmp_path / "out", tmp_path / "out" / "answers.jsonl.partial"
    with pytest.raises(RankError, match="the power is gone"):
        world1.run(run_some, asked, 2)
    assert not (out / "answers.jsonl").exists()
    with partial.open("a") as torn:
        torn.write('{"index": 3, "ans')

    other = {**asked, "generate": {**asked["generate"], "max_new_tokens": 5}}
    with pytest.raises(RankError, match="was begun with something else") as caught:
        world1.run(run_infer, other)
    assert "sampling.max_new_tokens: 4 there, 5 now" in str(caught.value)
    data = write_records(tmp_path / "other.jsonl", [BROKEN])
    with pytest.raises(RankError, match=r"content of data.eval: 6 samples, digest \w+ there, 1 samples"):
        world1.run(run_infer, {**asked, "data": {"eval": str(data), "workers": 0}})

    capfd.readouterr()
    assert world1.run(run_some, {**asked, "overwrite": True}, 9) == [2]
    assert "3 samples are done" in capfd.readouterr().out
    for name in ("answers.jsonl", "answers_errors.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()
    for line in (out / "answers.jsonl").read_text().splitlines():
        one, other = json.loads(line)["answers"]
        assert one != other


def test_what_other_ranks_had_done_is_not_done_again(asked, world1, world2, tmp_path):
    """An interrupted start of two processes is continued by one; the second has written to a file of its own."""
    assert world1.run(run_some, {**asked, "output": str(tmp_path / "whole")}, 9) == [4]
    with pytest.raises(RankError, match="the power is gone"):
        world2.run(run_some, asked, 1)
    out = tmp_path / "out"
    assert (out / "answers.jsonl.partial-1").exists()
    assert world1.run(run_some, asked, 9) == [2]
    for name in ("answers.jsonl", "answers_errors.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.glob("*.partial*"))


def test_ranks_without_a_usable_sample_compute_with_the_others(toys, tmp_path, world2):
    """The experts of each are on both."""
    records = questions_of(toys.records)[:1]
    data = write_records(toys.root / "one-usable.jsonl", [*records, BROKEN])
    alone = write_records(toys.root / "one.jsonl", [*records, *records])
    settings = {"tensor": 1, "expert": 2}
    one = answers_of(toys, world2, "moe", data, tmp_path / "one", settings, indices=[0])
    assert one == answers_of(toys, world2, "moe", alone, tmp_path / "two", settings, indices=[0, 1])[:1]
    scored = score_settings(toys.folder("moe"), toys.checkpoint("moe"), data, tmp_path / "scores", settings)
    write_records(toys.root / "one-usable.jsonl", [toys.records[0], BROKEN])
    assert world2.run(run_score, scored) == [0, 0]
    (line,) = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert line["index"] == 0
