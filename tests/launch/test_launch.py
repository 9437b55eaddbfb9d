"""The job scripts, without SLURM: what the dry run prints, and what the files have in common."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from clean_environment import environment

from megavlm.align.registry import METHODS

ROOT = Path(__file__).parents[2]
STAGES = {f"stage{n}": ["pretrain", f"configs/pretrain/stage{n}.yaml"] for n in range(4)}
TUNING = [name for name, method in METHODS.items() if not method.has_stages]
RECIPES = {name: f"configs/{'align' if METHODS[name].samples else 'tune'}/{name}.yaml" for name in TUNING}
JOBS = {**STAGES, **{name: [name, recipe] for name, recipe in RECIPES.items()}}


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
        count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z0-9_]+=", word))
        settings = dict(word.split("=", 1) for word in words[:count])
        ranks.append({"node": node, "local_rank": int(local_rank), "env": settings, "command": words[count:]})
    return shlex.split(srun), ranks


@pytest.mark.slow
def test_a_dry_run_says_whether_the_layout_fits() -> None:
    variables = environment(DRY_RUN="1", MEGAVLM_MODEL="2b", NODES="1", MEGAVLM_GPU="h100", MEGAVLM_VENV=sys.prefix)
    script = [ROOT / "launch/sft.sh", "train.lr=1e-5", "--restart"]
    done = subprocess.run(script, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    assert re.search(r"^by the plan, it .* on 8 × H100 SXM 80 GB", done.stderr, re.MULTILINE)
    assert len(done.stdout.splitlines()) == 2 + 8  # as without


@pytest.mark.parametrize("told", ["does not fit on 8 GPUs", "fits on 8 GPUs", None])
def test_a_job_says_if_the_layout_does_not_fit(told: str | None, tmp_path: Path) -> None:
    """``srun`` and ``python`` are scripts: the ranks have no work, and what a plan would say is known."""
    asked = tmp_path / "asked"
    says = f"echo by the plan, it {told}" if told else "exit 2"
    for file, line in ((tmp_path / "srun", "exit 0"), (tmp_path / "bin/python", f'echo "$@" >{asked}; {says}')):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{line}\n")
        file.chmod(0o755)
    variables = environment(
        MEGAVLM_GPU="h100", MEGAVLM_VENV=str(tmp_path), MEGAVLM_RUNS=str(tmp_path / "runs"), NODES="1"
    )
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    done = subprocess.run(
        [ROOT / "launch/sft.sh", "train.lr=1e-5"], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    warned = {"does not fit on 8 GPUs": "by the plan, it does not fit on 8 GPUs\n", "fits on 8 GPUs": ""}
    assert done.stderr == warned.get(told, "whether the layout fits h100 could not be found out\n")
    assert "train.lr=1e-5 --world-size 8 --no-files --for sft --gpu h100" in asked.read_text()
    del variables["MEGAVLM_GPU"]
    asked.unlink()
    subprocess.run([ROOT / "launch/sft.sh"], cwd=ROOT, env=variables, capture_output=True, check=True)
    assert not asked.exists()


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
    kept = next(word for word in srun if word.startswith("--container-env=")).partition("=")[2].split(",")
    assert set(kept) == set(ranks[0]["env"]) - {name for name in ranks[0]["env"] if name.startswith("SLURM_")}


def test_fp32_products_are_of_fp32_unless_the_reader_says_otherwise() -> None:
    named = lambda **variables: dry_run("sft", **variables)[1][0]["env"]["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"]
    assert [named(), named(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")] == ["0", "1"]


@pytest.mark.parametrize(
    ("variables", "interface"),
    [
        ({}, None),
        ({"NCCL_SOCKET_IFNAME": "lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, None),  # any but this
        ({"NCCL_SOCKET_IFNAME": "l"}, None),  # a prefix
        ({"NCCL_SOCKET_IFNAME": "lo,ib0"}, None),
        ({"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
    ],
)
def test_gloo_takes_the_interface_of_nccl_if_it_is_one(variables: dict[str, str], interface: str | None) -> None:
    assert dry_run("sft", **variables)[1][0]["env"].get("GLOO_SOCKET_IFNAME") == interface


def dry_run_with_servers(**variables: str) -> tuple[list[str], list[str], list[str]]:
    """The words of the trainer's step, of the last rank, and of the step of the servers."""
    done = subprocess.run(
        [ROOT / "launch/grpo.sh", "train.lr=1e-6"], cwd=ROOT, env=environment(DRY_RUN="1", **variables),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, srun, *_, rank, servers = done.stdout.splitlines()
    return shlex.split(srun), shlex.split(rank), shlex.split(servers)


def test_the_last_nodes_of_a_job_can_sample() -> None:
    srun, rank, servers = dry_run_with_servers(NODES="4", MEGAVLM_SERVER_NODES="2", MEGAVLM_SERVERS_PER_NODE="2")
    urls = [f"http://node{node}:{10000 + number}" for number, node in enumerate((2, 2, 3, 3))]
    words = ["train.lr=1e-6", "rollout.engine=vllm", f"rollout.vllm.url=[{','.join(urls)}]"]
    assert {"--nodes=2", "--relative=0", "--ntasks=16", "--ntasks-per-node=8"} <= set(srun)
    assert srun[-3:] == rank[-3:] == words
    assert rank[0] == "node1[7]"
    assert {"--nodes=2", "--relative=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=48"} <= set(servers)
    python = str(ROOT / ".venv/bin/python")
    server = [python, "-m", "megavlm.vllm.serve", "configs/align/grpo.yaml", "train.lr=1e-6"]
    share = ["rollout.engine=vllm", "rollout.vllm.tensor_parallel=4"]
    assert servers[-len(server + share) :] == server + share


@pytest.mark.parametrize(
    ("job", "variables", "said"),
    [
        ("sft", {"MEGAVLM_SERVER_NODES": "1"}, "sft samples no answers"),
        ("grpo", {"MEGAVLM_SERVER_NODES": "2"}, "the trainer needs one"),
        ("grpo", {"MEGAVLM_SERVER_NODES": "1", "MEGAVLM_SERVERS_PER_NODE": "3"}, "does not divide the 8 GPUs"),
    ],
)
def test_servers_that_cannot_be_are_refused(job: str, variables: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [ROOT / f"launch/{job}.sh"], cwd=ROOT, env=environment(DRY_RUN="1", **variables), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
