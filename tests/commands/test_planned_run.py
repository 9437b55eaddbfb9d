"""Runs that are planned while they go on (``log.plan``), and `validate --gpu`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from forkserver import forkserver
from parity import Toys
from test_train_verbs import megavlm, sft_config

from megavlm.base.errors import UserError
from megavlm.plan.of_run import gpu_called


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def test_names_of_gpus():
    assert gpu_called("NVIDIA H100 80GB HBM3", 79.2).name == "H100 SXM 80 GB"
    assert gpu_called("NVIDIA H200", 139.8).memory_gib == 139.8  # what it really has
    assert gpu_called("NVIDIA A100-SXM4-80GB", 79.3).name == "A100 SXM 80 GB"
    with pytest.raises(UserError, match="does not know the GPU NVIDIA GeForce RTX 4090"):
        gpu_called("NVIDIA GeForce RTX 4090", 23.6)


def planning(folder: Path, *facts: str) -> None:
    """In a forked process: what the process does that plans a run."""
    from megavlm.plan import of_run

    sys.argv = ["of_run", str(folder), str(os.getppid()), *facts]
    of_run.main()


def plan_in(folder: Path, *facts: str) -> dict:
    process = forkserver().Process(target=planning, args=(folder, *facts))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return json.loads((folder / "plan.json").read_text())


def test_what_the_process_writes(toys, tmp_path):
    config = sft_config(toys, tmp_path)
    (tmp_path / "config.yaml").write_text(config.read_text())
    found = plan_in(tmp_path, "sft", "2", "NVIDIA H200", "140.5")
    assert (found["device"], found["world_size"], found["gpu"]["memory_gib"]) == ("NVIDIA H200", 2, 140.5)
    assert found["stages"][0]["total"] > 0 < found["time"]["seconds"]
    assert "(3 processes / 1)" in plan_in(tmp_path, "sft", "3", "", "0.0")["error"]
    assert "does not know the GPU RTX 4090" in plan_in(tmp_path, "sft", "1", "RTX 4090", "24.0")["error"]
    (tmp_path / "config.yaml").write_text("[]")
    assert plan_in(tmp_path, "sft", "1", "", "0.0")["error"]


@pytest.mark.slow
def test_a_run_on_a_cpu_is_planned(toys, tmp_path):
    config, run = sft_config(toys, tmp_path, steps=3), tmp_path / "run"
    shown = megavlm("sft", config, "log.plan=true").stdout
    assert "not planned" not in shown
    plan, report = json.loads((run / "plan.json").read_text()), (run / "report.html").read_text()
    assert (plan["device"], plan["gpu"]["name"], plan["world_size"]) == (None, "H100 SXM 80 GB", 1)
    assert "Predicted and measured" in report
    assert "measured on a CPU" in report
    megavlm("sft", config, "output=" + str(tmp_path / "unplanned"))
    assert not (tmp_path / "unplanned" / "plan.json").exists()  # not on a CPU, unless asked for


@pytest.mark.slow
def test_the_plan_of_a_killed_run_ends_with_it(toys, tmp_path):
    (tmp_path / "config.yaml").write_text(sft_config(toys, tmp_path).read_text())
    trainer = forkserver().Process(target=waiting, args=(tmp_path,))
    trainer.start()
    number = tmp_path / "planner"
    deadline = time.monotonic() + 60
    while not number.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    planner = int(number.read_text())
    os.kill(trainer.pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{planner}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{planner}")
    assert not (tmp_path / "plan.json").exists()


def waiting(folder: Path) -> None:
    """In a forked process: a run that is planned and goes on."""
    import torch.distributed as dist

    from megavlm.base.atomic_files import write_text
    from megavlm.plan.of_run import PlanOfRun

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plan = PlanOfRun(folder, "sft")
    write_text(folder / "planner", str(plan._process.pid))
    time.sleep(600)


def test_validate_says_whether_it_fits(toys, tmp_path):
    config = sft_config(toys, tmp_path)
    asked = megavlm("validate", config, "--world-size", 2, "--gpu", "h100", "--no-files").stdout
    (line,) = [line for line in asked.splitlines() if line.startswith("by the plan")]
    assert line.startswith("by the plan, it fits on 2 × H100 SXM 80 GB (2 data-parallel), with 7")
    assert line.endswith("megavlm plan CONFIG.yaml --gpus 2 --gpu h100")
    assert "known are" in megavlm("validate", config, "--gpu", "h1000", "--no-files", status=2).stderr
