"""The command from outside: exit statuses, one message however many processes, signals, help.

The jobs themselves are replaced by small stand-ins: a sitecustomize.py, which every Python process of a test imports
first, puts a module with a `main` of the test's choice in place of the verb's target.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.base.errors import UserError
from megavlm.cli import environment
from megavlm.cli.main import main
from megavlm.cli.verbs import VERBS
from megavlm.config import describe

ROOT = Path(__file__).parents[2]
STAND_IN = """
import sys, types
def put(name):
    module = types.ModuleType(name)
    exec(open({job!r}).read(), module.__dict__)
    sys.modules[name] = module
for name in {targets!r}:
    put(name)
"""
CONFIG = """
model: {hf: hf, load: start}
data: {train: train.jsonl, eval: eval.jsonl, seq_length: 64}
train: {steps: 4, global_batch_size: 4, lr: 1e-3}
output: run
"""
PROCESS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current directory with a configuration and the files that it names."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in PROCESS_VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    (tmp_path / "hf").mkdir()
    (tmp_path / "start").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "eval.jsonl").write_text("")
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def start(place):
    """start(job, *arguments): the command as a process, with `job` (source of a `main`) in place of every verb's."""

    def start(job: str, *arguments: str, **variables: str) -> subprocess.Popen:
        (place / "job.py").write_text("import os, signal, sys, time\nrank = int(os.environ.get('RANK', 0))\n" + job)
        targets = [verb.target.partition(":")[0] for verb in VERBS.values()]
        (place / "sitecustomize.py").write_text(STAND_IN.format(job=str(place / "job.py"), targets=targets))
        environment = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}", **variables}
        command = [sys.executable, "-m", "megavlm", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def run(start):
    """run(job, *arguments): status, standard output and standard error of the finished command."""

    def run(job: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = start(job, *arguments, **variables)
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        return process.returncode, out, err

    return run


# -- checks before anything starts ---------------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    """What the command prints on standard error while ending with status 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian", "run.yaml"], "unknown verb 'pretrian'\n  → did you mean pretrain?"),
        (["sftt", "run.yaml"], "unknown verb 'sftt'\n  → did you mean sft?"),
        (["data", "prepair"], "unknown verb 'data prepair'\n  → did you mean data prepare?"),
        (["prepare", "shards"], "unknown verb 'prepare'\n  → did you mean data prepare?"),
        (["date", "inspect", "run.yaml"], "unknown verb 'date'\n  → did you mean data inspect?"),
        (["data", "run.yaml"], "unknown verb 'data run.yaml'\n  → verbs: data prepare, data inspect\n"),
        (["sft"], "megavlm sft needs a configuration file\n"),
        (["sft", "run.yaml", "--npro", "2"], "does not take --npro 2\n  → did you mean --nproc N?"),
        (["sft", "run.yaml", "--nproc", "0"], "argument --nproc: '0' is not a whole number of at least 1"),
        (["sft", "run.yaml", "--nproc", "two"], "argument --nproc: 'two' is not a whole number of at least 1"),
        (["validate", "run.yaml", "--nproc", "2"], "megavlm validate does not take --nproc 2"),
        (["sft", "none.yaml"], "cannot read configuration file none.yaml"),
        (["sft", "run.yaml", "train.sptes=3"], "did you mean train.steps?"),
        (["pretrain", "run.yaml"], "pretrain needs stage (pretraining stage)"),
        (["sft", "run.yaml", "train.lr=null", "data.train=[]"], "sft needs these settings:\n  data.train ("),
        (["sft", "run.yaml", "stage=1"], "stage is 1, but sft has no stages: the setting would be ignored"),
        (["score", "run.yaml", "model.load=null"], "score needs model.load"),
        (["infer", "run.yaml", "data.eval=null"], "infer has no questions"),
        (["infer", "run.yaml", "--image", "x.png"], "--image and --video can only be used with --prompt"),
        (["infer", "run.yaml", "--prompt", "?", "--image", "x.png"], "file x.png does not exist"),
        (["export", "run.yaml"], "megavlm export needs --out DIR\n"),
        (["export", "run.yaml", "--out", "hf"], "hf exists already"),
        (["data", "inspect"], "megavlm data inspect needs a configuration file\n"),
        (["data", "inspect", "run.yaml", "data.train=[]"], "data inspect needs data.train ("),
        (
            ["data", "inspect", "run.yaml", "--samples", "0"],
            "argument --samples: '0' is not a whole number of at least 1",
        ),
        (["data", "inspect", "run.yaml", "--out", "hf"], "hf exists already"),
        (["data", "prepare", "shards", "train.steps=3"], "megavlm data prepare does not take train.steps=3"),
        (["sft", "run.yaml", "model.hf=nowhere"], "model.hf is nowhere, which does not exist"),
        (["sft", "run.yaml", "model.hf=start"], "model.hf is start, a folder without config.json"),
        (["sft", "run.yaml", "model.load=gone"], "model.load is gone, which does not exist"),
        (["chat", "run.yaml", "--adapter", "gone"], "model.adapter is gone, which does not exist"),
        (["sft", "run.yaml", "data.train=[{path: gone}]"], "data.train[0].path is gone, which does not exist"),
        (["sft", "run.yaml", "parallel.tensor=2"], "1 process cannot hold the layout"),
        (["sft", "run.yaml", "--nproc", "3"], "train.global_batch_size is 4, which is not divisible by the 3"),
        (["sft", "run.yaml", "output=hf"], "output hf is not empty and holds no run"),
    ],
)
def test_user_errors_end_with_status_2_and_one_message(place, capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_scores_are_not_written_over(place, capsys):
    (place / "run").mkdir()
    (place / "run/scores.jsonl").write_text("{}")
    assert "run/scores.jsonl exists already" in refused(capsys, "score", "run.yaml")


def test_nothing_is_started_for_a_bad_setting(run):
    status, out, err = run(
        "def main(settings, **flags): print('started')", "sft", "run.yaml", "train.steps=no", "--nproc", "2"
    )
    assert (status, out) == (2, "")
    assert err.strip().splitlines() == [
        "error: train.steps is 'no' (override train.steps=no); allowed: whole number ≥ 1, or null"
    ]


# -- one process ---------------------------------------------------------------------------------------------------


def test_a_job_gets_its_settings_and_flags(run):
    job = (
        "def main(settings, prompt, image, video, ema):\n"
        "    print(settings.train.steps, prompt, [str(p) for p in image], video, ema)"
    )
    status, out, err = run(
        job,
        "infer",
        "run.yaml",
        "--prompt",
        "what?",
        "--image",
        "train.jsonl",
        "train.steps=7",
        "--image",
        "eval.jsonl",
    )
    assert (status, out, err) == (0, "7 what? ['train.jsonl', 'eval.jsonl'] [] False\n", "")


def test_a_verb_of_two_words_and_one_without_settings(run):
    job = "def main(*settings, **flags): print([s.train.steps for s in settings], sorted(flags.items()))"
    status, out, err = run(job, "data", "inspect", "run.yaml", "train.steps=7")
    assert (status, err) == (0, "")
    flags = {
        "duplicates": False,
        "out": Path("data-inspect"),
        "part": None,
        "samples": 200,
        "verb": None,
        "workers": None,
    }
    assert out == f"[7] {sorted(flags.items())}\n"
    status, out, err = run(job, "data", "prepare", "--jsonl", "a.jsonl", "b.jsonl", "--out", "c", "--skip-broken")
    assert (status, err) == (0, "")
    flags = {"folder": None, "jsonl": ["a.jsonl", "b.jsonl"], "out": Path("c"), "shard_size": None}
    flags |= {"media_roots": [], "media_protocols": [], "workers": None, "part": None}
    assert out == f"[] {sorted((flags | {'skip_broken': True, 'force': False}).items())}\n"
    assert "'folder', 'shards'" in run(job, "data", "prepare", "--force", "shards")[1]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("raise UserError('a.jsonl:3: no such picture', 'look')", 2, "error: a.jsonl:3: no such picture\n  → look\n"),
        ("raise RuntimeError('bug')", 1, "RuntimeError: bug"),
    ],
)
def test_exit_status_of_one_process(run, body, status, message):
    job = f"from megavlm.base.errors import UserError\ndef main(settings, **flags): {body}"
    code, _, err = run(job, "sft", "run.yaml")
    assert code == status
    assert message in err
    assert ("Traceback" in err) == (status == 1 and bool(message))


# -- several local processes ---------------------------------------------------------------------------------------


def test_workers_know_their_place_and_rank_0_has_the_terminal(run):
    job = (
        "def main(settings, **flags):\n"
        "    names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'.split()\n"
        "    line = ' '.join(os.environ[n] for n in names)\n"
        "    print(line)\n"
        "    open(f'rank{rank}', 'w').write(line + ' ' + os.environ['MASTER_PORT'])\n"
    )
    variables = {"OMP_NUM_THREADS": "5"}  # the user's own choice stands
    status, out, err = run(job, "sft", "run.yaml", "--nproc", "2", **variables)
    assert (status, out, err) == (0, "0 0 2 2 127.0.0.1 5\n", "")
    first, second = Path("rank0").read_text(), Path("rank1").read_text()
    assert second.startswith("1 1 2 2 127.0.0.1 5 ")
    assert first.split()[-1] == second.split()[-1]


def test_threads_are_shared_out_by_default(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    status, out, _ = run(
        "def main(settings, **flags): print(os.environ['OMP_NUM_THREADS'])", "sft", "run.yaml", "--nproc", "2"
    )
    assert status == 0
    assert int(out) == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.parametrize("failing", ["rank == 1", "rank == 0", "True"])
def test_a_workers_user_error_is_told_once(run, failing):
    job = (
        "from megavlm.base.errors import UserError\n"
        "def main(settings, **flags):\n"
        f"    if {failing}: raise UserError('a.jsonl:3: no such picture', 'look')\n"
        "    time.sleep(30)\n"  # as a peer that waits in a collective
    )
    started = time.monotonic()
    status, out, err = run(job, "sft", "run.yaml", "--nproc", "2")
    assert (status, out, err) == (2, "", "error: a.jsonl:3: no such picture\n  → look\n")
    assert time.monotonic() - started < 20


def test_peers_of_a_failed_worker_keep_their_connections(run):
    """A peer whose collective broke would bury the message under its own, some of them from threads of C++."""
    job = (
        "import torch, torch.distributed as dist\n"
        "from megavlm.base.errors import UserError\n"
        "def main(settings, **flags):\n"
        "    dist.init_process_group('gloo')\n"
        "    dist.barrier()\n"
        "    if rank == 1: raise UserError('bad row')\n"
        "    try: dist.all_reduce(torch.ones(1))\n"
        "    except RuntimeError: open('broken', 'w').close()\n"
    )
    status, _, err = run(job, "sft", "run.yaml", "--nproc", "2")
    assert status == 2
    assert err.endswith("error: bad row\n")
    assert not Path("broken").exists()


def test_a_failed_worker_waits_to_be_ended_with_its_connections_open(start, place):
    job = "from megavlm.base.errors import UserError\ndef main(settings, **flags): raise UserError('bad row')"
    process = start(job, "sft", "run.yaml", MEGAVLM_FAILURE_FOLDER=str(place / "told"), RANK="1")
    wait_for("told/failure_1.json")
    time.sleep(0.5)
    waits = process.poll() is None
    process.kill()
    _, err = process.communicate()
    assert waits
    assert err == ""


def test_a_workers_crash_is_told_once_with_its_traceback(run):
    job = "def main(settings, **flags):\n    if rank == 1: 1 / 0\n    time.sleep(30)\n"
    status, _, err = run(job, "sft", "run.yaml", "--nproc", "2")
    assert status == 1
    assert err.startswith("error: rank 1 failed:\nTraceback")
    assert err.count("ZeroDivisionError") == 1


def test_a_killed_worker_is_named_and_its_last_words_shown(run):
    job = (
        "def main(settings, **flags):\n    print('last words', flush=True)\n"
        "    if rank == 1: os.kill(os.getpid(), 9)\n    time.sleep(30)\n"
    )
    status, _, err = run(job, "sft", "run.yaml", "--nproc", "2")
    assert status == 1
    assert err.startswith("error: rank 1 was ended by SIGKILL; the end of its output:\nlast words\n")


def test_a_workers_own_status_is_kept(run):
    assert run("def main(settings, **flags): return 2 * rank", "sft", "run.yaml", "--nproc", "2")[0] == 2
    assert run("def main(settings, **flags): return 7 * rank", "sft", "run.yaml", "--nproc", "2")[0] == 1


STOPPABLE = """
def main(settings, **flags):
    stop = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stop.append(number))
    open(f'ready{rank}', 'w').close()
    while not stop:
        time.sleep(0.01)
    time.sleep(0.3)  # as if a checkpoint were written
    open(f'stopped{rank}', 'w').write(str(int(stop[0])))
"""


def wait_for(*names: str) -> None:
    deadline = time.monotonic() + 30
    while not all(Path(name).exists() for name in names):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGTERM)],
)
def test_stop_signals_reach_all_workers_and_the_end_is_clean(start, sent, received):
    process = start(STOPPABLE, "sft", "run.yaml", "--nproc", "2")
    wait_for("ready0", "ready1")
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert [Path(f"stopped{rank}").read_text() for rank in range(2)] == [str(int(received))] * 2


def test_a_second_ctrl_c_ends_at_once(start):
    job = (
        "def main(settings, **flags):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open(f'ready{rank}', 'w').close()\n    time.sleep(60)\n"
    )
    process = start(job, "sft", "run.yaml", "--nproc", "2")
    wait_for("ready0", "ready1")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "press Ctrl-C again to stop at once" in err


def test_no_worker_outlives_a_killed_parent(start):
    job = "def main(settings, **flags):\n    open(f'ready{rank}', 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    process = start(job, "sft", "run.yaml", "--nproc", "2")
    wait_for("ready0", "ready1")
    time.sleep(0.1)
    workers = [int(Path(f"ready{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.05)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


# -- inside torchrun or srun ---------------------------------------------------------------------------------------

PLACE = (
    "def main(settings, **flags):\n"
    "    print(*map(os.environ.get, ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT']))\n"
)
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_place_from_srun(run):
    assert run(PLACE, "sft", "run.yaml", **SRUN)[1] == "3 4 1 gpu07 20294\n"
    given = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert run(PLACE, "sft", "run.yaml", **given)[1] == "3 4 1 10.0.0.1 29500\n"


def test_a_batch_script_without_srun_is_one_process(run):
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert run(PLACE, "sft", "run.yaml", **batch)[1] == "None None None None None\n"


def test_place_from_torchrun_is_left_alone(run):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1", **SRUN}
    assert run(PLACE, "sft", "run.yaml", **given)[1] == "1 2 1 h 1\n"


def test_half_a_place_and_nproc_in_a_group_are_refused(run):
    status, _, err = run(PLACE, "sft", "run.yaml", RANK="0")
    assert status == 2
    assert "the environment has RANK=0 but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in err
    status, _, err = run(PLACE, "sft", "run.yaml", "--nproc", "2", **SRUN)
    assert status == 2
    assert "--nproc 2 cannot be used in a process that torchrun or srun started (one of 4)" in err


def test_processes_of_one_launcher_tell_a_user_error_once(run, place):
    """Two processes with one parent, as the ranks under torchrun."""
    launcher = (
        "import subprocess, sys, os\n"
        "common = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': 'h', 'MASTER_PORT': '1'}\n"
        "command = [sys.executable, '-m', 'megavlm', 'sft', 'run.yaml', 'model.hf=gone']\n"
        "ranks = [subprocess.Popen(command, env={**common, 'RANK': r, 'LOCAL_RANK': r}) for r in '01']\n"
        "print(*(rank.wait() for rank in ranks))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", launcher], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 2\n"
    assert done.stderr.count("error: model.hf is gone") == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-012,20],x1", "gpu007"),
        ("a[1,3]-ib,b", "a1-ib"),
        ("rack-2-node[11]", "rack-2-node11"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("rack[02,5-7]n[08-11]-ib[0-1],x[1-2]", "rack02n08-ib0"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert environment.first_host(nodes) == first


def test_a_broken_node_list_is_named():
    with pytest.raises(UserError, match=r"(?s)n\[1,n2.*MASTER_ADDR"):
        environment.first_host("n[1,n2")


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name} " in out
        assert verb.summary in out


def test_help_of_a_group_lists_its_verbs(capsys):
    for arguments, status in (["data"], 2), (["data", "--help"], 0):
        assert main(arguments) == status
        out = capsys.readouterr().out
        assert out.startswith("usage: megavlm data VERB")
        assert [line.split()[1] for line in out.splitlines() if line.startswith("  data ")] == ["prepare", "inspect"]


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_lists_its_settings(capsys, name):
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    verb = VERBS[name]
    assert verb.example.splitlines()[0] in out
    assert all("--" + flag.replace("_", "-") in out for flag in verb.flags)
    sections = ("", *verb.sections) if verb.sections else ()
    shown = [entry for entry in describe.entries() if entry.section in sections]
    assert all(entry.key in out for entry in shown)
    required = {line.split()[0] for line in out.splitlines() if " required " in line}
    alone = {key for key in verb.requires if "|" not in key}  # of several, any one of which is enough, none is marked
    assert required == ({"model.hf", *alone} if verb.sections else set())
    assert ("CONFIG.yaml" in out) == bool(verb.sections)


def test_no_arguments_is_a_mistake_that_shows_the_help(capsys):
    assert main([]) == 2
    assert "usage: megavlm VERB" in capsys.readouterr().out


def test_help_and_checks_do_not_import_torch(place):
    code = (
        "import sys, megavlm.cli.main as cli\n"
        "cli.main(['sft', '--help'])\n"
        "cli.main(['sft', 'run.yaml', 'model.hf=gone'])\n"
        "cli.main(['grpo', 'run.yaml', 'model.load=gone', 'rollout.prompts=8', 'reward=[{name: exact}]',\n"
        "          'align.loss=dapo', 'align.advantage=rloo'])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0
