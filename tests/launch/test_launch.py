"""The job scripts, without SLURM: shellcheck, what the dry run prints, and what a job does with srun's stand-ins."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.align.registry import METHODS

ROOT = Path(__file__).parents[2]
STAGES = {f"stage{n}": ["pretrain", f"configs/pretrain/stage{n}.yaml"] for n in range(4)}
TUNING = [name for name, method in METHODS.items() if not method.has_stages]
RECIPES = {name: f"configs/{'align' if METHODS[name].samples else 'tune'}/{name}.yaml" for name in TUNING}
JOBS = {**STAGES, **{name: [name, recipe] for name, recipe in RECIPES.items()}}


def environment(**variables: str) -> dict[str, str]:
    """The reader's environment less everything that a job script looks at."""
    ours = re.compile(r"(SLURM|MEGAVLM|NCCL|MASTER|CUDA|HF|DRY|NODES|OMP|TOKENIZERS|PYTORCH)")
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | variables


def dry_run(job: str, *overrides: str, cwd: Path = ROOT, **variables: str) -> tuple[list[str], list[dict]]:
    """The printed srun command, and for each rank its node, local rank, environment and command."""
    script = os.path.relpath(ROOT / "launch" / f"{job}.sh", cwd)
    done = subprocess.run(
        [script, *overrides],
        cwd=cwd,
        env=environment(DRY_RUN="1", **variables),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    _, srun, *lines = done.stdout.splitlines()
    ranks = []
    for line in lines:
        place, *words = shlex.split(line)
        node, local_rank = re.fullmatch(r"(\S+)\[(\d+)\]", place).groups()
        count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
        settings = dict(word.split("=", 1) for word in words[:count])
        ranks.append({"node": node, "local_rank": int(local_rank), "env": settings, "command": words[count:]})
    return shlex.split(srun), ranks


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    files = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"])
    done = subprocess.run([shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_dry_run_shows_each_rank(job: str) -> None:
    srun, ranks = dry_run(job, "train.lr=1e-5", "output=a folder")
    command = [str(ROOT / ".venv/bin/python"), "-m", "megavlm", *JOBS[job], "train.lr=1e-5", "output=a folder"]
    assert srun[0] == "srun"
    assert {"--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=12"} <= set(srun)
    assert srun[-len(command) :] == command
    assert len(ranks) == 16
    for rank, shown in enumerate(ranks):
        assert (shown["node"], shown["local_rank"]) == (f"node{rank // 8}", rank % 8)
        assert shown["command"] == command
        assert shown["env"]["SLURM_PROCID"] == str(rank)
        assert shown["env"]["SLURM_LOCALID"] == str(rank % 8)
        assert shown["env"]["SLURM_NTASKS"] == "16"
        assert shown["env"]["MASTER_ADDR"] == "node0"
    assert len({rank["env"]["MASTER_PORT"] for rank in ranks}) == 1


@pytest.mark.parametrize("job", TUNING)
def test_the_tuner_chooses_the_recipe(job: str) -> None:
    for tuner, config in {"lora": RECIPES[job].replace(".yaml", "-lora.yaml"), "full": RECIPES[job]}.items():
        srun, ranks = dry_run(job, "train.lr=1e-5", MEGAVLM_TUNER=tuner)
        assert srun[-3:] == [job, config, "train.lr=1e-5"]
        assert ranks[-1]["command"][-3:] == srun[-3:]
        assert (ROOT / config).is_file()


@pytest.mark.parametrize(("job", "tuner"), [("stage1", "lora"), ("sft", "Lora")])
def test_a_tuner_without_a_recipe_is_refused(job: str, tuner: str) -> None:
    variables = environment(DRY_RUN="1", MEGAVLM_TUNER=tuner)
    done = subprocess.run([ROOT / f"launch/{job}.sh"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert f"MEGAVLM_TUNER is {tuner}, but configs/" in done.stderr


def test_printed_environment_is_what_the_command_understands() -> None:
    """The command takes its place among the ranks from the printed variables."""
    shown = dry_run("stage1")[1][11]["env"]
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    code = f"import os, megavlm.cli.environment as e; print(e.join_group(), *map(os.environ.get, {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**shown), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["16", "11", "16", "3", "node0", shown["MASTER_PORT"]]


@pytest.mark.parametrize("job", JOBS)
def test_scripts_differ_in_name_and_command_alone(job: str) -> None:
    """Five copies of SLURM's header lines, which cannot be shared, stay alike."""

    def general(name: str) -> list[str]:
        lines = (ROOT / "launch" / f"{name}.sh").read_text().replace(f"megavlm-{name}", "megavlm-JOB").splitlines()
        return [lines[0], *lines[2:-1]]

    assert general(job) == general("stage0")


def test_scripts_name_the_nodes_that_the_models_are_for() -> None:
    line = next(x for x in (ROOT / "launch/stage0.sh").read_text().splitlines() if x.startswith("# Nodes by model:"))
    named = dict(re.findall(r"(\S+) (\d+)[,.]", line.partition(":")[2]))
    configs = sorted((ROOT / "configs/models").glob("*.yaml"))
    worlds = {path.stem: int(re.match(r"# world: (\d+)", path.read_text())[1]) for path in configs}
    assert {model: 8 * int(nodes) for model, nodes in named.items()} == worlds
    assert f"#SBATCH --nodes={named['8b']}\n" in (ROOT / "launch/stage0.sh").read_text()


def test_dry_run_from_another_folder_with_other_nodes(tmp_path: Path) -> None:
    srun, ranks = dry_run("stage1", cwd=tmp_path, NODES="3", NCCL_DEBUG="INFO", MEGAVLM_VENV="/opt/my venv")
    assert len(ranks) == 24
    assert ranks[-1]["node"] == "node2"
    assert ranks[0]["env"]["NCCL_DEBUG"] == "INFO"
    assert ranks[0]["command"][0] == "/opt/my venv/bin/python"
    assert "--nodes=3" in srun


def test_dry_run_with_a_container() -> None:
    srun, ranks = dry_run("sft", MEGAVLM_IMAGE="/images/megavlm.sqsh", MEGAVLM_MOUNTS="/data:/data")
    assert "--container-image=/images/megavlm.sqsh" in srun
    assert f"--container-workdir={ROOT}" in srun
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in srun
    assert ranks[0]["command"][0] == "python"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A job's environment, with scontrol and srun replaced by programs that note how they were called.

    `srun` runs its command line's last word as a shell command, and answers USR1 with `signalled` in the notes.
    """
    program(
        tmp_path / "scontrol",
        """case $1 in
          show) printf '%s\\n' gpu17 gpu23 ;;
          requeue) echo "requeue $2" >>"$NOTES" ;;
        esac
        """,
    )
    program(
        tmp_path / "srun",
        """trap 'echo signalled >>"$NOTES"; kill $!; exit 0' USR1
        bash -c "${!#}" &
        echo "$MASTER_ADDR $MASTER_PORT" >>"$NOTES"
        wait $!
        """,
    )
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NAME": "megavlm-stage1",
        "SLURM_JOB_NODELIST": "gpu[17,23]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "14",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MEGAVLM_RUNS": str(tmp_path / "runs"),
    }


def test_dry_run_inside_an_allocation(slurm: dict[str, str]) -> None:
    srun, ranks = dry_run("stage1", **slurm)
    assert [rank["node"] for rank in ranks] == ["gpu17"] * 4 + ["gpu23"] * 4
    assert {(rank["env"]["MASTER_ADDR"], rank["env"]["MASTER_PORT"]) for rank in ranks} == {("gpu17", "23456")}
    assert {"--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=14"} <= set(srun)


def spooled(tmp_path: Path, last_word: str, slurm: dict[str, str]) -> subprocess.Popen:
    """Starts a copy of a job script from elsewhere, as sbatch does."""
    script = tmp_path / "slurm_script"
    script.write_text((ROOT / "launch/stage1.sh").read_text())
    return subprocess.Popen(
        ["bash", script, last_word], cwd=tmp_path, env=environment(**slurm), stdout=subprocess.PIPE, text=True
    )


def signal_once_started(job: subprocess.Popen, slurm: dict[str, str]) -> str:
    """Sends USR1 when srun has noted its start; returns what the job printed."""
    deadline = time.monotonic() + 10
    while not Path(slurm["NOTES"]).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    return job.communicate(timeout=10)[0]


@pytest.mark.parametrize("status", [0, 2])
def test_job_ends_as_its_ranks_do(tmp_path: Path, slurm: dict[str, str], status: int) -> None:
    job = spooled(tmp_path, f"exit {status}", slurm)
    job.communicate(timeout=20)
    assert job.returncode == status
    assert Path(slurm["NOTES"]).read_text() == "gpu17 23456\n"
    assert (tmp_path / "runs/logs/megavlm-stage1-123456").is_dir()


def test_signalled_job_hands_the_signal_on_and_is_requeued(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = spooled(tmp_path, "sleep 20", slurm)
    output = signal_once_started(job, slurm)
    assert job.returncode == 0
    assert Path(slurm["NOTES"]).read_text() == "gpu17 23456\nsignalled\nrequeue 123456\n"
    assert output.endswith("requeued\n")


def test_failure_after_the_signal_is_not_requeued(tmp_path: Path, slurm: dict[str, str]) -> None:
    program(tmp_path / "srun", "trap 'kill $!; exit 7' USR1; sleep 20 & echo started >>$NOTES; wait $!")
    job = spooled(tmp_path, "", slurm)
    signal_once_started(job, slurm)
    assert job.returncode == 7
    assert Path(slurm["NOTES"]).read_text() == "started\n"
