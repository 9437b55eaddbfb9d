"""The job scripts under a real SLURM on this host: submitted, warned, requeued, cancelled, continued.

The trainer itself runs where bits are compared. Where only the script's decision matters, a shell script of one line
stands for `.venv/bin/python`, because a start of the trainer costs 15 seconds of two cores.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import forked_command
import one_host_slurm
import pytest
from one_host_slurm import OneHostSlurm, wait_until
from test_kill import metrics_of, same_bits
from toy import toy_folder, toy_records, write_records

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    bool(one_host_slurm.missing()),
    reason=f"SLURM is not installed (Debian's slurmctld, slurmd, slurm-client, munge): {one_host_slurm.missing()}",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneHostSlurm]:
    running = OneHostSlurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.close()


def submitted(slurm: OneHostSlurm, folder: Path, script: str, *words: str, **variables: str) -> str:
    """Submits launch/SCRIPT.sh from the checkout; returns the job's number. The job's log is FOLDER/job.log.

    ``words``: options of sbatch, then, from the first that does not begin with "--", arguments of the script.
    """
    count = next((n for n, word in enumerate(words) if not word.startswith("--")), len(words))
    options = ["--parsable", f"--chdir={ROOT}", f"--output={folder}/job.log", *words[:count]]
    variables |= {"MEGAVLM_HOME": str(ROOT), "MEGAVLM_RUNS": str(folder / "runs"), "NCCL_SOCKET_IFNAME": "=lo"}
    return slurm.run("sbatch", *options, f"{ROOT}/launch/{script}.sh", *words[count:], **variables).strip()


def ended(slurm: OneHostSlurm, job: str, log: Path) -> str:
    """Waits for the end of a job; returns the state in which it ended."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    try:
        wait_until(lambda: slurm.state(job) in ends, "the job ends")
    except AssertionError as error:
        text = log.read_text() if log.exists() else ""
        raise AssertionError(f"{error}; {slurm.state(job)}\n{text}") from None
    return slurm.state(job)


class Job:
    """A job whose "python" is the shell script ``trainer``, run in ``folder``; one retry if it fails."""

    def __init__(
        self, slurm: OneHostSlurm, folder: Path, trainer: str, *options: str, script: str = "stage1", **variables: str
    ):
        self._slurm, self._folder = slurm, folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").write_text(f"#!/bin/bash\ncd {folder}; echo start >>starts\n{trainer}\n")
        (folder / "bin/python").chmod(0o755)
        self.number = submitted(
            slurm, folder, script, *options, "train.lr=1e-5", MEGAVLM_VENV=str(folder), MEGAVLM_RETRIES="1", **variables
        )
        self.logs = folder / f"runs/logs/megavlm-{script}-{self.number}"

    def read(self, name: str) -> str:
        return (self._folder / name).read_text()

    def ended(self) -> tuple[str, int, list[str]]:
        """Waits for the end; returns the job's state, the number of starts of ranks, what its log says of requeues."""
        state = ended(self._slurm, self.number, self._folder / "job.log")
        said = [line for line in self.read("job.log").splitlines() if "requeued: " in line]
        return state, len(self.read("starts").split()), said

    def wait_for(self, name: str) -> None:
        wait_until((self._folder / name).exists, f"the trainer has written {name}")


STEPS = 8
ONE = ("--nodes=1", "--ntasks-per-node=1")
STOPS = "[[ -e saved ]] && exit 0; trap 'touch saved; exit 0' USR1; while :; do sleep 0.1; done"
OVERRUNS = "[[ -e ready ]] && exit 0; trap '' USR1; touch ready; sleep 300"


class Training:
    """Supervised tuning of a toy model on two data ranks, by launch/sft.sh and without SLURM."""

    def __init__(self, slurm: OneHostSlurm, folder: Path):
        self._slurm, self.folder = slurm, folder
        for name in ("data", "models"):
            (folder / name).mkdir()
        (folder / "models/2b").symlink_to(toy_folder(folder / "models"))
        write_records(folder / "data/sft.jsonl", toy_records(folder / "data"))
        self._variables = {
            "MEGAVLM_MODEL": "2b",
            "MEGAVLM_MODELS": str(folder / "models"),
            "MEGAVLM_DATA": str(folder / "data"),
            "MEGAVLM_VENV": sys.prefix,
            "MEGAVLM_PLATFORM": "cpu",
        }
        self._settings = [
            f"model.load={folder}/models/2b", "model.freeze=[]", "data.eval=null", "data.seq_length=256",
            "data.workers=1",
            f"train.steps={STEPS}", "train.global_batch_size=2", "train.warmup_steps=2", "train.precision=fp32",
            "train.lr=1e-3", "train.memory_check=false", "checkpoint.every=3", "log.wandb.mode=off",
        ]  # fmt: skip

    def submit(self, run: str) -> str:
        """Submits the job, which writes to FOLDER/RUN; returns its number."""
        (self.folder / run).mkdir()
        shape = ["--nodes=2", "--ntasks-per-node=1"]
        arguments = [*shape, *self._settings, f"output={self.folder}/{run}/output"]
        return submitted(self._slurm, self.folder / run, "sft", *arguments, **self._variables)

    def uninterrupted(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The output of the same run with nothing between, in processes that are forked; trained at the first call."""
        output = self.folder / "uninterrupted"
        if not output.exists():
            for name, value in {**self._variables, "GLOO_SOCKET_IFNAME": "lo"}.items():
                monkeypatch.setenv(name, value)
            recipe = str(ROOT / "configs/tune/sft.yaml")
            done = forked_command.run(["sft", recipe, *self._settings, f"output={output}", "--nproc", "2"])
            assert done.returncode == 0, done.stdout + done.stderr
        return output

    def wait_for(self, run: str, file: str) -> None:
        """Waits until something is in this file or folder of the output."""
        path = self.folder / run / "output" / file
        wait_until(lambda: path.is_dir() or (path.exists() and path.read_text()), f"{run} has written {file}")

    def starts(self, run: str) -> list[str]:
        """What rank 0 has printed, one text for each start."""
        (log,) = self.folder.glob(f"{run}/runs/logs/*/rank-0.log")
        return re.split(r"^ +output +/.*\n", log.read_text(), flags=re.MULTILINE)[1:]

    @staticmethod
    def first_step(printed: str) -> int:
        return int(re.search(rf"^step +(\d+)/{STEPS} ", printed, flags=re.MULTILINE)[1])

    def has_the_bits_of(self, straight: Path, run: str) -> bool:
        output = self.folder / run / "output"
        return metrics_of(output) == metrics_of(straight) and same_bits(
            *(folder / f"checkpoints/step_{STEPS:08}" for folder in (output, straight))
        )


@pytest.fixture(scope="module")
def training(slurm: OneHostSlurm, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(slurm, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def warned(training: Training) -> str:
    """The number of the job that is to be warned."""
    return training.submit("warned")


@pytest.fixture(scope="module")
def jobs(slurm: OneHostSlurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs that need nothing of a test, submitted at once: they wait beside one another."""
    folder = tmp_path_factory.mktemp("jobs")
    make = lambda name, trainer, *options: Job(slurm, folder / name, trainer, *options)
    return {
        "header": make("header", "printenv MASTER_ADDR GLOO_SOCKET_IFNAME; printf '%s\\n' \"$@\""),
        "limit": make("limit", STOPS, *ONE, "--time=2", "--signal=B:USR1@90"),  # half a minute before it is too late
        "overran": make("overran", OVERRUNS, *ONE, "--time=1", "--signal=B:USR1@60"),
        "failed": make("failed", "exit 1", *ONE),
        "wrong": make("wrong", "exit 2", *ONE),
        "killed": make("killed", "[[ $(wc -l <starts) == 2 ]] || kill -9 $$", *ONE),
    }


def test_the_same_bits_after_a_warning_and_a_requeue(
    slurm: OneHostSlurm, training: Training, warned: str, jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is submitted before the small ones, which run beside it."""
    training.wait_for("warned", "metrics.jsonl")
    slurm.run("scancel", "--batch", "--signal=USR1", warned)  # what SLURM does before the time limit
    straight = training.uninterrupted(monkeypatch)
    log = training.folder / "warned/job.log"
    assert ended(slurm, warned, log) == "COMPLETED"
    said = [line for line in log.read_text().splitlines() if "requeued" in line]
    assert said == ["requeued: stopped before the time limit"]
    before, after = training.starts("warned")
    stopped = int(re.search(r"stopped at step (\d+)", before)[1])
    assert 1 <= stopped < STEPS
    assert training.first_step(after) == stopped + 1
    assert training.has_the_bits_of(straight, "warned")


@pytest.mark.slow
def test_the_same_bits_after_a_killed_node(
    slurm: OneHostSlurm, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.submit("killed")
    training.wait_for("killed", "checkpoints/step_00000003")
    _, second = slurm.nodes(job)
    slurm.kill_node(second)
    slurm.start_node(second)
    straight = training.uninterrupted(monkeypatch)
    assert ended(slurm, job, training.folder / "killed/job.log") == "COMPLETED"
    _, after = training.starts("killed")
    assert training.first_step(after) >= 4
    assert training.has_the_bits_of(straight, "killed")


def test_a_job_runs_as_its_header_says(jobs: dict[str, Job]) -> None:
    """Two nodes, eight ranks on each; the ranks' addresses and arguments."""
    job = jobs["header"]
    assert job.ended() == ("COMPLETED", 16, [])
    words = ["127.0.0.1", "lo", "-m", "megavlm", "pretrain", "configs/pretrain/stage1.yaml", "train.lr=1e-5"]
    for rank in range(16):
        assert (job.logs / f"rank-{rank}.log").read_text().split() == words


def test_warned_before_the_time_limit_it_is_requeued(jobs: dict[str, Job]) -> None:
    """SLURM's own signal, within 30 seconds of the start: its limits are minutes, and it looks twice a minute."""
    assert jobs["limit"].ended() == ("COMPLETED", 2, ["requeued: stopped before the time limit"])


def test_overrunning_the_warning_it_is_requeued(jobs: dict[str, Job]) -> None:
    why = "step and checkpoint took longer than the warning before the time limit"
    assert jobs["overran"].ended() == ("COMPLETED", 2, [f"requeued: {why}; failure 1 in a row, of at most 1"])


def test_a_failed_rank_is_tried_again_a_bounded_number_of_times(jobs: dict[str, Job]) -> None:
    job = jobs["failed"]
    state, starts, said = job.ended()
    assert (state, starts) == ("FAILED", 2)
    why = f"a rank failed (status 1); see {job.logs}"
    assert said == [
        f"requeued: {why}; failure 1 in a row, of at most 1",
        f"not requeued: {why}; failure 2 in a row, and MEGAVLM_RETRIES is 1",
    ]


def test_wrong_settings_are_not_tried_again(jobs: dict[str, Job]) -> None:
    state, starts, said = jobs["wrong"].ended()
    assert (state, starts) == ("FAILED", 1)
    assert [line.partition(";")[0] for line in said] == ["not requeued: settings or data are wrong (status 2)"]


def test_a_killed_rank_is_tried_again(jobs: dict[str, Job]) -> None:
    state, starts, said = jobs["killed"].ended()
    assert (state, starts) == ("COMPLETED", 2)
    assert [line.partition(";")[0] for line in said] == ["requeued: a rank failed (status 137)"]


def test_a_cancelled_job_stays_cancelled(slurm: OneHostSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path / "job", "touch ready; sleep 20", *ONE)
    job.wait_for("ready")
    slurm.run("scancel", job.number)
    assert job.ended() == ("CANCELLED", 1, [])


def test_a_killed_node_requeues_the_job(slurm: OneHostSlurm, tmp_path: Path) -> None:
    again = "[[ -e ready$SLURM_PROCID ]] && exit 0; touch ready$SLURM_PROCID; sleep 300"
    job = Job(slurm, tmp_path / "job", again, "--nodes=2", "--ntasks-per-node=1")
    for rank in range(2):
        job.wait_for(f"ready{rank}")
    _, second = slurm.nodes(job.number)
    slurm.kill_node(second)
    slurm.start_node(second)
    assert job.ended()[:2] == ("COMPLETED", 4)


# The rank writes its arguments and ends when the servers have come up twice. A server dies at its first start.
WITH_SERVERS = """
if [[ $2 == megavlm ]]; then
  echo "$SLURMD_NODENAME ${@:3}" >rank$SLURM_PROCID
  until [[ -e again0 && -e again1 ]]; do sleep 0.1; done
  exit 0
fi
name=server$SLURM_PROCID
echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES ${MASTER_PORT:-none} $@" >$name
[[ -e died$SLURM_PROCID ]] || { touch died$SLURM_PROCID; exit 1; }
touch again$SLURM_PROCID; sleep 300
"""


def test_servers_have_the_last_node_and_end_with_the_trainer(slurm: OneHostSlurm, tmp_path: Path) -> None:
    job = Job(
        slurm, tmp_path / "job", WITH_SERVERS, "--nodes=2", "--ntasks-per-node=2",
        script="grpo", MEGAVLM_SERVER_NODES="1", MEGAVLM_SERVERS_PER_NODE="2",
    )  # fmt: skip
    state, starts, said = job.ended()
    assert (state, starts, said) == ("COMPLETED", 2 + 4, [])
    first, last = (job.read(f"{name}0").split()[0] for name in ("rank", "server"))
    assert first < last
    port = 10000 + 10 * (int(job.number) % 900)
    urls = f"rollout.vllm.url=[http://127.0.0.1:{port},http://127.0.0.1:{port + 1}]"
    for number in range(2):
        words = "grpo configs/align/grpo.yaml train.lr=1e-5 rollout.engine=vllm"
        assert job.read(f"rank{number}").split() == [first, *words.split(), urls]
        server = "-m megavlm.vllm.serve configs/align/grpo.yaml train.lr=1e-5 rollout.engine=vllm"
        rest = f"rollout.vllm.tensor_parallel=1 --port {port + number}"
        assert job.read(f"server{number}").split() == [last, str(number), "none", *server.split(), *rest.split()]
    wait_until(lambda: not one_host_slurm.processes_with(f"SLURM_JOB_ID={job.number}"), "the servers have ended", 30)
