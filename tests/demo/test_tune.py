"""The tuning demo without its training: what it goes on from, what it runs, and when it says that a bound is missed."""

import pytest

from megavlm.config.errors import UserError
from megavlm.demo import tune
from megavlm.demo.answers import expected_answers
from megavlm.demo.data import read_records, write_records

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def out(tmp_path, demo_data, demo_model):
    """The folder of a demo that has been pretrained."""
    out = tmp_path / "out"
    (out / "stage3" / "checkpoints" / "step_00000006").mkdir(parents=True)
    (out / "data").symlink_to(demo_data)
    (out / "model").symlink_to(demo_model)
    return out


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
    assert verbs(started.commands) == ["checkpoint_tools/hf2mcore.py", *["pretrain"] * 4]
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


@pytest.mark.parametrize(
    ("won", "before", "after", "passed"),
    [(1.0, 0.7, 0.9, True), (0.9, 0.7, 0.9, False), (1.0, 0.85, 0.9, False), (0.95, 0.0, 0.1, True)],
)
def test_each_bound_is_held(out, capsys, won, before, after, passed):
    run = tune.Tune(out)
    run.out.mkdir()
    expected = expected_answers(run.heldout)
    scores = []
    for i, right in enumerate(expected):
        scores += [(digit == int(right)) == (i < won * len(expected)) for digit in range(10)]
    (run.out / "rm_scores").mkdir()
    write_records(run.out / "rm_scores" / "scores.jsonl", ({"index": i, "score": s} for i, s in enumerate(scores)))
    for name, share in (("mediocre_answers", before), ("dpo_answers", after)):
        given = [right if i < share * len(expected) else "?" for i, right in enumerate(expected)]
        write_answers(run.out / name, given)
    assert run.check() is passed
    assert ("MISSED" in capsys.readouterr().out) is not passed
