"""When a run ends because of its data: how samples are counted, what is saved, and how it goes on."""

import json
import shutil
from pathlib import Path

import pytest
from parity import settings_of

TALK = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
GOOD, LONG = json.dumps({"messages": TALK}), json.dumps({"text": "word " * 400})


def train(settings: dict, spoil_after: int | None = None) -> tuple[str, str]:
    """Runs on every rank: `megavlm sft`. Returns the message and remedy with which it ends, or ("done", "").

    ``spoil_after``: the step after which nothing in the data file can be read any more.
    """
    from megavlm.align.registry import make_method
    from megavlm.base.errors import UserError
    from megavlm.config.settings import Settings
    from megavlm.training.hooks import Hook
    from megavlm.training.loop import train as train_by

    made = Settings(**settings)

    def spoil(run, step, say):
        path = made.data.train[0].path
        if step == spoil_after:
            path.write_text("x" * len(path.read_text()))

    try:
        train_by(made, make_method("sft", made), [Hook(spoil, every=1)])
    except UserError as error:
        return error.message, error.remedy or ""
    return "done", ""


@pytest.fixture
def start(toys, tmp_path):
    """start(world, lines, run, **data): trains on a file of these lines; returns how it ends, and its metrics."""

    def start(world, lines, run="run", steps=4, spoil_after=None, **data):
        (tmp_path / "talks.jsonl").write_text("\n".join(lines) + "\n")
        settings = settings_of(toys.folder("dense"), {}, steps=steps, memory_check=False)
        settings["model"]["load"] = str(toys.checkpoint("dense"))
        settings["data"] |= {"train": [{"path": str(tmp_path / "talks.jsonl")}], "workers": 0, "packing_buffer": 60}
        settings["data"] |= data
        settings |= {"output": str(tmp_path / run), "log": {"wandb": {"mode": "off"}}}
        ends = world.run(train, settings, spoil_after)
        assert len(set(ends)) == 1, "all ranks end in the same way"
        return *ends[0], lines_of(tmp_path / run / "metrics.jsonl")

    start.folder = tmp_path
    return start


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(lines, *names):
    return [[line[name] for name in names] for line in lines]


def test_four_broken_samples_of_52_do_not_end_a_run_however_often_they_are_read(start, world2):
    """Several times more samples than there are wait in the buffer of each of two ranks."""
    lines = [GOOD] * 48
    for place in (3, 17, 30, 44):
        lines.insert(place, "{")
    end, _, metrics = start(world2, lines, packing_buffer=300, max_bad_fraction=0.08)
    assert end == "done"
    assert [line["bad_samples"] for line in metrics] == [4] * 4
    trained = 0
    for line in metrics:
        trained += line["samples"]
        # four of 52 are skipped, also among those that were read and still wait in the buffers of two ranks
        assert trained <= line["epoch/talks"] * 52 <= trained + 2 * 4 + 4 / 52 * (trained + 2 * 300)
    assert trained > 2 * 52


def test_a_run_that_ends_for_its_data_is_saved_and_goes_on_once_they_are_repaired_or_allowed(start, world1):
    """Ten broken lines of 60; the same bits as a run that has allowed them from the beginning."""
    broken = [GOOD] * 50
    for place in range(0, 60, 6):
        broken.insert(place, "{")
    end, remedy, ended = start(world1, broken, max_bad_fraction=0.15)
    assert "talks: of 60 samples, 10 are broken (16.7 %): more than data.max_bad_fraction = 0.15" in end
    assert ": not valid JSON" in end
    assert "raise data.max_bad_fraction" in remedy
    assert "repair them" in remedy
    run = start.folder / "run"
    assert len(ended) < 4
    assert (run / "checkpoints" / f"step_{len(ended):08}").is_dir()

    again, _, metrics = start(world1, broken, max_bad_fraction=0.15)
    assert again == end
    assert metrics == ended, "no step is made before the data are looked at"

    shutil.copytree(run, start.folder / "repaired")
    end, _, repaired = start(world1, [GOOD] * 60, "repaired", max_bad_fraction=0.15)
    assert end == "done"
    assert [line["bad_samples"] for line in repaired[len(ended) :]] == [0] * (4 - len(ended))
    assert (start.folder / "repaired" / "data_errors.jsonl").read_text() == ""

    end, _, allowed = start(world1, broken, max_bad_fraction=0.5)
    assert end == "done"
    end, _, straight = start(world1, broken, "straight", max_bad_fraction=0.5)
    names = ("step", "loss", "grad_norm", "samples", "bad_samples", "epoch/talks")
    assert of(allowed, *names) == of(straight, *names)
    assert (run / "data_errors.jsonl").read_text() == (start.folder / "straight" / "data_errors.jsonl").read_text()


def test_a_run_that_cannot_read_a_source_any_more_is_saved_and_goes_on_when_it_can(start, world2):
    """Not a sample can be read from some step on; the same bits as a run that was never disturbed."""
    lines = [json.dumps({"messages": [TALK[0], {"role": "assistant", "content": f"{n}."}]}) for n in range(40)]
    one_a_row = {"packing": "none", "packing_buffer": 1000, "max_bad_fraction": 1.0}
    end, _, ended = start(world2, lines, spoil_after=2, **one_a_row)
    assert "data source talks" in end
    assert "consecutive samples cannot be used" in end
    assert len(ended) == 2
    assert [path.name for path in (start.folder / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert start(world2, lines, **one_a_row)[0] == "done"
    _, _, straight = start(world2, lines, "straight", **one_a_row)
    names = ("step", "loss", "grad_norm", "samples", "bad_samples", "epoch/talks")
    assert of(lines_of(start.folder / "run" / "metrics.jsonl"), *names) == of(straight, *names)


def test_a_run_ends_if_nine_samples_of_ten_are_too_long(start, world1):
    lines = ([LONG] * 9 + [GOOD]) * 12
    end, remedy, metrics = start(world1, lines)
    assert "samples, " in end
    assert "are too long for a row (" in end
    assert "more than data.max_dropped_fraction = 0.2" in end
    assert "raise data.max_dropped_fraction" in remedy
    assert "data.seq_length" in remedy
    assert (start.folder / "run" / "checkpoints" / f"step_{len(metrics):08}").is_dir()
    end, _, metrics = start(world1, lines, max_dropped_fraction=0.9)
    assert end == "done"
    assert metrics[-1]["dropped_samples"] == 108
