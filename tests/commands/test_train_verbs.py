"""`megavlm sft` and its neighbours as a user runs them: processes of their own, files in, files out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import forked_command
import pytest
import torch
from parity import LR, VARYING, Toys, part_of, train_reference
from safetensors.torch import load_file
from toy import write_records

from megavlm.convert import mcore_to_hf


def megavlm(
    *arguments: object, status: int = 0, from_outside: bool = False, stdin: str = ""
) -> subprocess.CompletedProcess:
    """Runs the command; fails with its output if it ends otherwise.

    ``from_outside``: in new interpreters, as a user starts it, and not in forked processes.
    """
    words = [str(argument) for argument in arguments]
    if from_outside:
        command = [sys.executable, "-m", "megavlm", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    else:
        done = forked_command.run(words, stdin)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def sft_config(toys: Toys, folder: Path, **train) -> Path:
    """A configuration of plain SGD on the eight toy records, one a row; without the memory check.

    It starts from the Hugging Face folder, as most users do.
    """
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.folder("dense"))},
        "data": {
            "train": [{"path": str(write_records(toys.root / "train.jsonl", toys.records))}],
            "seq_length": 128, "packing": "none", "shuffle": False, "workers": 1,
        },
        "train": {
            "precision": "fp32", "optimizer": "sgd", "lr": LR, "schedule": "constant", "steps": 1,
            "global_batch_size": 8, "clip_grad": 0.0, "weight_decay": 0.0,
            "memory_check": False, **train,
        },
        "log": {"wandb": {"mode": "off"}},
        "output": str(folder / "run"),
    }  # fmt: skip
    path = folder / "sft.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_step_of_sft_is_that_of_plain_pytorch(toys, tmp_path):
    lr = 1.0  # the update stands far above the rounding of the weights it is added to
    done = megavlm("sft", sft_config(toys, tmp_path, memory_check=True), f"train.lr={lr}", from_outside=True)
    assert "× 128 tokens, 122 of them visual" in done.stdout
    assert re.search(r"start +Hugging Face folder /", done.stdout)
    mcore_to_hf(
        tmp_path / "run" / "checkpoints" / "step_00000001", toys.folder("dense"), tmp_path / "hf", progress=False
    )
    start, after = (load_file(folder / "model.safetensors") for folder in (toys.folder("dense"), tmp_path / "hf"))
    reference = train_reference(toys.folder("dense"), toys.records, toys.root, lr=lr, steps=1)

    (line,) = metrics_of(tmp_path / "run")
    ((loss, norms),) = reference.steps
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-5)
    for part, norm in norms.items():
        assert line[f"grad_norm/{part}"] == pytest.approx(norm, rel=1e-5)
    assert (line["images"], line["samples"]) == (9, 8)
    assert line["frames_encoded"] == line["frames"] == 11
    assert set(after) == set(start)
    for name, value in after.items():
        update = reference.weights[name] - start[name]
        assert (value - reference.weights[name]).norm() < 1e-4 * update.norm(), name


def test_a_frozen_part_keeps_its_bits(toys, tmp_path):
    """The other parts, and several at once, in tests/distributed/test_layouts.py."""
    part = "vision"
    megavlm("sft", sft_config(toys, tmp_path), f"model.freeze=[{part}]", "train.lr=1.0")
    mcore_to_hf(
        tmp_path / "run" / "checkpoints" / "step_00000001", toys.folder("dense"), tmp_path / "hf", progress=False
    )
    start, after = (load_file(folder / "model.safetensors") for folder in (toys.folder("dense"), tmp_path / "hf"))
    reference = train_reference(toys.folder("dense"), toys.records, toys.root, (part,), lr=1.0, steps=1)
    (line,) = metrics_of(tmp_path / "run")
    assert line[f"grad_norm/{part}"] == 0.0
    for name, value in after.items():
        if part_of(name) == part:
            assert torch.equal(value, start[name]), name
        else:
            update = reference.weights[name] - start[name]
            assert (value - reference.weights[name]).norm() < 1e-4 * update.norm(), name


def test_a_part_thaws(toys, tmp_path):
    """Its numbers against plain PyTorch in tests/distributed/test_layouts.py; here, what the run says of it."""
    changes = ("model.freeze=[vision, language]", "train.unfreeze_after={language: 1}", "train.steps=3")
    done = megavlm("sft", sft_config(toys, tmp_path), *changes)
    assert done.stdout.count("step 2: language is unfrozen") == done.stdout.count("is unfrozen and trained") == 1
    assert "vision frozen" in done.stdout
    assert "from step 2 on" in done.stdout
    lines = metrics_of(tmp_path / "run")
    assert [line["lr/language"] for line in lines] == [0.0, LR, LR]
    assert [line["lr/vision"] for line in lines] == [0.0] * 3
    assert [line["grad_norm/language"] > 0 for line in lines] == [False, True, True]


def test_a_stopped_run_continues_on_the_same_bits(toys, tmp_path):
    for name, steps in (("whole", [4]), ("halves", [2, 4])):
        config = sft_config(toys, tmp_path, optimizer="adam", global_batch_size=4)
        for count in steps:
            megavlm("sft", config, f"output={tmp_path / name}", f"train.steps={count}", "data.shuffle=true")
    whole, halves = (
        [{k: v for k, v in line.items() if k not in VARYING} for line in metrics_of(tmp_path / name)]
        for name in ("whole", "halves")
    )
    assert whole == halves
    for name in ("whole", "halves"):
        mcore_to_hf(tmp_path / name / "checkpoints" / "step_00000004", toys.folder("dense"), tmp_path / f"hf-{name}")
    one, other = (load_file(tmp_path / f"hf-{name}" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_bad_data_ends_with_status_2_and_one_message(toys, tmp_path):
    config = sft_config(toys, tmp_path)
    broken = [toys.records[0], {**toys.records[1], "images": toys.records[1]["images"][:2]}]
    data = write_records(toys.root / "broken.jsonl", broken * 4)
    changes = (f"data.train=[{{path: {data}}}]", "data.max_bad_fraction=0", "parallel.tensor=2")
    done = megavlm("sft", config, "--nproc", 2, *changes, status=2)
    assert done.stderr.count("error:") == 1
    assert "broken.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr
