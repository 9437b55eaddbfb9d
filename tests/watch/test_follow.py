"""Following metrics.jsonl: while it grows, when it is replaced, and when its lines are not what they should be."""

import json
import math
import os

import pytest
import yaml

from megavlm.base.errors import UserError
from megavlm.watch.follow import FollowedRun, find_runs, is_main, sorted_fields


def write(folder, lines, mode="w") -> None:
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def values(run, field="loss") -> dict[int, float]:
    run.read()
    points = run.points(field, 1000)
    return dict(zip(points.steps, points.means, strict=True))


def test_lines_are_read_as_they_come(tmp_path):
    run = FollowedRun(tmp_path, "run")
    assert values(run) == {}
    write(tmp_path, [{"step": 1, "loss": 2.0}])
    assert values(run) == {1: 2.0}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
        file.flush()
        assert values(run) == {1: 2.0, 2: 1.5}
        file.write('ss": 1.0}\n')
    version = run.version
    assert values(run) == {1: 2.0, 2: 1.5, 3: 1.0}
    assert run.version != version
    version = run.version
    run.read()
    assert run.version == version


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path):
    run = FollowedRun(tmp_path, "run")
    write(tmp_path, [{"step": step, "loss": 1.0, "old": 1.0} for step in range(1, 9)])
    assert len(values(run)) == 8
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", [{"step": step, "loss": 2.0} for step in range(1, 20)])  # longer than before
    os.replace(tmp_path / "new" / "metrics.jsonl", tmp_path / "metrics.jsonl")  # as ``drop_after`` does it
    assert values(run) == dict.fromkeys(range(1, 20), 2.0)
    assert run.fields == ["loss"]
    write(tmp_path / "new", [{"step": step, "loss": 5.0} for step in range(1, 20)])  # of the same length
    os.replace(tmp_path / "new" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert values(run) == dict.fromkeys(range(1, 20), 5.0)
    write(tmp_path, [{"step": 1, "loss": 3.0}])  # shorter, the same file
    assert values(run) == {1: 3.0}
    write(tmp_path, [{"step": step, "loss": 4.0} for step in range(1, 30)])  # longer, the same file, other lines
    assert values(run) == dict.fromkeys(range(1, 30), 4.0)
    (tmp_path / "metrics.jsonl").unlink()
    assert values(run) == {}


def test_lines_that_are_no_metrics_do_no_harm(tmp_path):
    lines = [b"{", b"[]", b'{"loss": 1}', b'{"step": "x", "loss": 1}', b'{"step": -1, "loss": 1}', b"\xff\xfe"]
    lines += [b'{"step": 1%s, "loss": 1}' % (b"0" * 400), b'{"step": true, "loss": 9}', b"null"]
    lines += [b'{"step": 2, "loss": 1%s}' % (b"0" * 400), b'{"step": 3, "loss": NaN, "kl": "x"}']
    lines += [b'{"step": 4, "loss": {"a": 1}, "entropy": null}', b'{"step": 5, "loss": 0.5}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert values(FollowedRun(tmp_path, "run")) == {5: 0.5}


def test_a_field_that_comes_and_goes_keeps_its_steps(tmp_path):
    write(tmp_path, [{"step": s, **({"eval/loss": s / 10} if s % 5 == 0 else {})} for s in range(1, 23)])
    run = FollowedRun(tmp_path, "run")
    assert values(run, "eval/loss") == {5: 0.5, 10: 1.0, 15: 1.5, 20: 2.0}
    assert run.last("eval/loss") is None
    assert run.last("nothing") is None


def test_a_long_curve_is_thinned_and_keeps_its_extremes(tmp_path):
    write(tmp_path, [{"step": s, "loss": 100.0 if s == 50 else 1.0} for s in range(1, 101)])
    run = FollowedRun(tmp_path, "run")
    run.read()
    points = run.points("loss", 25)
    assert points.steps == list(range(4, 101, 4))
    assert (points.lows[12], points.means[12], points.highs[12]) == (1.0, 25.75, 100.0)
    assert math.fsum(points.means) * 4 == 199.0


def test_what_is_said_of_a_run(tmp_path):
    write(tmp_path, [{"step": s, "loss": 1.0, "seconds": 2.0, "skipped": int(s == 2), "kl": 5.0} for s in (1, 2, 3)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 13}}))
    change = {"step": 1, "time": "now", "setting": "train.lr", "old": 1, "new": 2}
    (tmp_path / "changes.jsonl").write_text(json.dumps(change) + "\n")
    run = FollowedRun(tmp_path, "run")
    run.read()
    facts = run.facts()
    assert (facts["step"], facts["total"], facts["loss"], facts["left"]) == (3, 13, "1.000", 20.0)
    assert facts["ago"] < 100
    assert facts["reward"] is None
    continued, skipped, warned = facts["notes"]
    assert continued == "continued after step 1 with train.lr 2"
    assert skipped.startswith("step 2 was skipped")
    assert warned.startswith("since step 1, the policy runs away")


def test_runs_are_found_in_folders_and_told_apart(tmp_path):
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/run", "b/run"):
        write(tmp_path / name, [])
    assert [run.name for run in find_runs([tmp_path / "a", tmp_path / "b" / "run", tmp_path / "a" / "run"])] == [
        *("a/run", "b/run")
    ]
    (waiting,) = find_runs([tmp_path / "c"])  # it has not started yet
    assert (waiting.name, waiting.facts()["step"]) == ("c", None)
    with pytest.raises(UserError, match="is no folder"):
        find_runs([tmp_path / "d"])


def test_fields_worth_a_look_come_first():
    """Of held-out data, losses and scores; how long answers are, and what each scorer gives, can be chosen."""
    held_out = ["eval/loss", "eval/a/loss", "eval/b/loss", "eval/answers/score", "eval/a/answers/score"]
    main = ["loss", *held_out, "eval/a/accuracy", "eval/accuracy", "lr", "grad_norm"]
    others = ["a", "eval/a/answers/score/exact", "eval/answers/length", "eval/answers/score/exact", "grad_norm/vision"]
    assert sorted_fields(sorted([*main, *others])) == [*main, *others]
    assert [name for name in [*main, *others] if is_main(name)] == main
