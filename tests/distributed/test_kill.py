"""``kill -9`` of any rank at any moment: the same command continues, and ends on the same bits."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from killing import Commands, Kill
from parity import LR, VARYING, mostly_slow
from toy import toy_records, write_records

from megavlm.checkpoint.folders import latest
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.monitor.metrics import read_metrics

LAYOUTS = {"DP2": [], "TP2": ["parallel.tensor=2"]}


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def sft(toys, tmp_path_factory):
    """sft(output, steps, overrides): arguments of a run on the toy records that saves every second step."""
    folder = tmp_path_factory.mktemp("killed")
    data = write_records(toys.root / "killed.jsonl", toy_records(toys.root))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"train": [{"path": str(data)}], "seq_length": 256, "packing_buffer": 4, "workers": 1},
        "train": {
            "optimizer": "adam",
            "lr": LR,
            "precision": "fp32",
            "global_batch_size": 2,
            "warmup_steps": 2,
            "deterministic": True,
        },
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"wandb": {"mode": "off"}},
    }
    (folder / "sft.yaml").write_text(json.dumps(config))
    return lambda output, steps, overrides: [
        *("sft", str(folder / "sft.yaml"), f"output={output}", f"train.steps={steps}", *overrides)
    ]


def same_bits(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors: weights and optimizer state."""
    first, second = McoreCheckpoint(one), McoreCheckpoint(other)
    assert first.tensors == second.tensors
    assert any(key.startswith("optimizer.state.exp_avg_sq.vision") for key in first.tensors)
    return all(torch.equal(first.read(key), second.read(key)) for key in first.tensors)


def metrics_of(output: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in VARYING} for line in read_metrics(output)]


def reached(output: Path) -> int:
    """Step of the newest whole checkpoint."""
    newest = latest(output / "checkpoints")
    return int(newest.name.removeprefix("step_")) if newest else 0


def is_continued(commands, arguments, straight: Path, killed: Path, kills, steps: int) -> None:
    """Kills the run in ``killed`` again and again, lets it end, and compares it with the one in ``straight``."""
    assert commands.run(arguments(straight), 2, straight).statuses == [0, 0], straight.with_suffix(".log").read_text()
    half_written = 0
    for kill in kills:
        outcome = commands.run(arguments(killed), 2, killed, kill(reached(killed)))
        assert outcome.statuses[kill(0).rank] == -9
        assert not outcome.survivors
        half_written += any((killed / "checkpoints").glob("*.partial"))
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "loss')  # as a kill in the middle of a line would leave it
    assert half_written, "no kill met a checkpoint in the making"
    outcome = commands.run(arguments(killed), 2, killed)
    assert outcome.statuses == [0, 0], killed.with_suffix(".log").read_text()
    assert not outcome.survivors
    assert [line["step"] for line in metrics_of(killed)] == list(range(1, steps + 1))
    assert metrics_of(killed) == metrics_of(straight)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == steps
    final = f"checkpoints/step_{steps:08}"
    assert same_bits(killed / final, straight / final)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [
        f"step_{steps - 2:08}", f"step_{steps:08}"
    ]  # fmt: skip


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, {"TP2"}.__contains__))
def test_killed_three_times(layout, commands, sft, tmp_path):
    """In the middle of training, while a checkpoint is written, and while the run starts again."""
    kills = [
        lambda done: Kill(rank=0, step=done + 3, delay=0.05),
        lambda done: Kill(rank=1, step=done + 1, writing=True),
        lambda done: Kill(rank=0, delay=0.7),
    ]
    arguments = lambda output: sft(output, 8, LAYOUTS[layout])
    is_continued(commands, arguments, tmp_path / "straight", tmp_path / "killed", kills, 8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_twenty_times(layout, commands, sft, tmp_path):
    draw = random.Random(layout)
    kills = []
    for number in range(20):
        rank, ahead, delay = draw.randrange(2), draw.randrange(4), draw.random()
        if number % 4 == 0:
            kills.append(lambda done, rank=rank: Kill(rank, done + 1, writing=True))
        elif ahead == 0:
            kills.append(lambda done, rank=rank, delay=delay: Kill(rank, delay=5 * delay))  # of starting, or later
        else:
            kills.append(lambda done, rank=rank, ahead=ahead, delay=delay: Kill(rank, done + ahead, 0.5 * delay))
    arguments = lambda output: sft(output, 60, LAYOUTS[layout])
    is_continued(commands, arguments, tmp_path / "straight", tmp_path / "killed", kills, 60)
    shutil.rmtree(tmp_path)
