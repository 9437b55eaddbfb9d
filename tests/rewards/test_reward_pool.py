"""Rewards in worker processes: bad rewards cost only the answers that they fail for, and no process is left over."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest

from megavlm.base.errors import RunFailure, UserError
from megavlm.config.settings import RewardSettings
from megavlm.rewards import worker
from megavlm.rewards.pool import RewardPool, check_rewards
from megavlm.rewards.worker_process import WorkerProcess

FILE = Path(__file__).parent / "bad_rewards.py"
SECONDS = 2.0  # a time-out; an innocent answer gets half of it and needs milliseconds, also on a busy machine


def python(function: str, **settings) -> RewardSettings:
    return RewardSettings(python=f"{FILE}:{function}", **settings)


class Unsendable:
    def __reduce__(self):
        raise pickle.PicklingError("a lock")


# For each group: the answers, and the cause of each that must fail; "" for those that get 1.
BAD = {
    "fine": {"a": "", "b": ""},
    "raise": {"a": "", "raise": "RuntimeError: the judge is out", "b": ""},
    "exit": {"exit": "its process ended with status 3", "a": "", "b": ""},
    "system exit": {"a": "", "system exit": "SystemExit: enough"},
    "crash": {"a": "", "crash": "its process was killed by SIGSEGV"},
    "killed": {"a": "", "killed": "its process was killed by SIGKILL", "b": ""},
    "killed alone": {"killed": "its process was killed by SIGKILL"},
    "slow": {"sleep": "no result after", "a": ""},
    "all slow": {"sleep": "no result after 2 s"},
    "nan": {"nan": "it returned nan, which is not a finite number", "a": ""},
    "infinity": {"infinity": "it returned inf, which is not a finite number", "a": ""},
    "text": {"text": "it returned '1', which is not a finite number", "a": ""},
    "a function": {"a": "", "lambda": "it returned <function obey"},
    "too few": {"short": "it returned 0 values for 1 answers", "a": ""},
    "text instead": {"text instead": "it returned '111', not a list"},
    "number instead": {"number instead": "it returned 1.0, not a list"},
}


@pytest.fixture(scope="module")
def judged():
    """The scores of all groups in BAD, which go through one pool together."""
    rewards = [
        python("obey", timeout=SECONDS, weight=2.0),
        RewardSettings(name="exact"),
        python("lengths", weight=0.5),
        RewardSettings(model="runs/rm"),
    ]
    with RewardPool(rewards, workers=4) as pool:
        for key, answers in BAD.items():
            count = len(answers)
            pool.submit(key, list(answers), {"answer": [3] * count, "prompts": ["xy"] * count})
        pool.submit("unsendable", ["a"], {"answer": [Unsendable()]})
        pool.submit("empty", [], {})
        assert pool.pending == len(BAD) + 2
        found = dict(pool.wait())
        assert pool.pending == 0
        assert pool.results() == []
    return found


@pytest.mark.parametrize("key", BAD)
def test_only_the_guilty_answer_fails(judged, key):
    for (text, cause), found in zip(BAD[key].items(), judged[key], strict=True):
        others = {"exact": 0.0, "lengths": len(text) + 2.0 + 3.0}
        if cause:
            assert found.total is None
            assert found.parts == {"obey": None, **others}
            assert [failure[: len("obey: ") + len(cause)] for failure in found.failures] == [f"obey: {cause}"]
        else:
            assert found.parts == {"obey": 1.0, **others}
            assert (found.total, found.failures) == (2.0 + 0.5 * others["lengths"], [])


def test_what_cannot_be_sent_fails_and_an_empty_group_is_returned(judged):
    [found] = judged["unsendable"]
    assert found.total is None
    assert len(found.failures) == 3
    assert "the record cannot be sent to a worker: PicklingError: a lock" in found.failures[0]
    assert judged["empty"] == []


def test_a_group_in_which_every_answer_ends_its_worker_is_given_up():
    with RewardPool([python("obey", timeout=30)], workers=1) as pool:
        pool.submit(0, ["exit"] * 5, {})
        pool.submit(1, ["none"], {})
        found = dict(pool.wait())
    causes = [score.failures[0] for score in found[0]]
    assert causes[:3] == ["obey: its process ended with status 3"] * 3
    assert causes[3:] == ["obey: not tried after 3 other answers: its process ended with status 3"] * 2
    assert (found[1][0].total, found[1][0].parts, found[1][0].failures) == (None, {"obey": None}, [])


def processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def ends(pid: int) -> bool:
    """Whether a process ends within half a minute."""
    until = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_many_groups_leave_nothing_and_a_killed_worker_is_replaced():
    handles = len(os.listdir("/proc/self/fd"))

    def judge(pool: RewardPool) -> set[int]:
        """Has 100 groups judged. Returns the process ids of the workers that did it."""
        seen = {}
        for key in range(100):
            pool.submit(key, ["a", "b"], {"text": ["x" * 1000] * 2})
            seen.update(pool.results())
        seen.update(pool.wait())
        assert sorted(seen) == list(range(100))
        assert not [score.failures for scores in seen.values() for score in scores if score.failures]
        return {int(scores[0].parts["process_id"]) for scores in seen.values()}

    with RewardPool([python("process_id")], workers=2) as pool:
        first = judge(pool)
        workers = {worker.pid for worker in pool._workers}  # other processes of this one may come and go
        assert first <= workers <= processes()
        for pid in workers:  # the second one may still be starting, when the first has judged all
            for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # of a job that is stopped
                os.kill(pid, stop)
        assert judge(pool) <= workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert not judge(pool) & workers
        later = {worker.pid for worker in pool._workers}
        assert len(later) == 2
    assert not (workers | later) & processes()
    assert len(os.listdir("/proc/self/fd")) <= handles


def test_workers_that_are_found_dead_when_they_are_called_are_replaced(monkeypatch):
    """Nothing else wakes the pool up: the last group has been submitted, and no process is left."""
    with RewardPool([python("process_id")], workers=2) as pool:
        while len(ready := [worker for worker in list(pool._workers) if worker.is_ready]) < 2:
            time.sleep(0.01)
        called = WorkerProcess.call

        def call(worker: WorkerProcess, *given) -> None:
            if worker in ready:
                raise BrokenPipeError
            called(worker, *given)

        monkeypatch.setattr(WorkerProcess, "call", call)
        pool.submit(0, ["a"], {})
        assert [key for key, _ in pool.results(timeout=60)] == [0]


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_that_is_killed_from_outside_costs_no_answer(count, tmp_path):
    """Not even in the middle of the call of a single answer, which nothing else could be to blame for."""
    with RewardPool([python("waits_for", timeout=60)], workers=1) as pool:
        pool.submit(0, ["a"] * count, {"sign": [str(tmp_path)] * count})
        killed = set()
        for _ in range(min(count, 2)):  # all answers together, and then the first one alone
            while not (begun := {int(path.name) for path in tmp_path.iterdir()} - killed):
                pool.results(0.01)
            os.kill(min(begun), signal.SIGKILL)
            killed |= begun
        (tmp_path / "go").touch()
        [(_, scores)] = pool.wait()
    assert [(score.total, score.failures) for score in scores] == [(1.0, [])] * count


def test_a_job_that_is_stopped_while_workers_start_keeps_them():
    with RewardPool([python("process_id")], workers=1) as pool:
        while not (workers := list(pool._workers)):
            time.sleep(0.001)
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(workers[0].pid, stop)
        pool.submit(0, ["a"], {})
        [(_, [score])] = pool.wait()
        assert int(score.total) == workers[0].pid


def test_what_a_reward_has_started_ends_with_its_worker():
    with RewardPool([python("child")], workers=1) as pool:
        pool.submit(0, ["a"], {})
        [(_, [score])] = pool.wait()
        started = int(score.total)
        assert psutil.pid_exists(started)
    assert ends(started)


def test_workers_end_with_a_killed_trainer():
    """Even in the middle of a call, when they do not notice that their connection is closed."""
    code = f"""
import os, time
from megavlm.config.settings import RewardSettings
from megavlm.rewards import worker
from megavlm.rewards.pool import RewardPool
rewards = [RewardSettings(python={str(FILE)!r} + ":" + name) for name in ("process_id", "obey")]
pool = RewardPool(rewards, workers=1)
pool.submit(0, ["a"], {{}})
print(int(pool.wait()[0][1][0].parts["process_id"]), flush=True)
pool.submit(1, ["sleep"], {{}})
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=90)
    assert ends(int(done.stdout))


def test_workers_import_neither_torch_nor_sympy():
    code = "import sys, megavlm.rewards.worker; print(*{'torch', 'sympy', 'pydantic', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


def test_files_that_cannot_be_used_are_refused_before_the_run(tmp_path):
    (tmp_path / "wrong.py").write_text("\n\ndef f(:\n")
    (tmp_path / "ending.py").write_text("import os\nos._exit(7)\n")
    for name, message in (
        ("wrong", f"the reward own cannot be loaded: {tmp_path}/wrong.py:3 cannot be used: SyntaxError"),
        ("ending", "the rewards exact, own cannot be loaded: their process ended with status 7"),
    ):
        own = RewardSettings(python=f"{tmp_path}/{name}.py:f", label="own")
        with pytest.raises(UserError) as error:
            check_rewards([RewardSettings(name="exact"), RewardSettings(model="runs/rm"), own])
        assert message in error.value.message
    check_rewards([python("obey"), RewardSettings(model="runs/rm")])
    check_rewards([RewardSettings(model="runs/rm")])


def test_a_comparison_without_end_is_killed():
    with RewardPool([RewardSettings(name="math", timeout=1.0)], workers=1) as pool:
        pool.submit("a", [r"\boxed{5}"], {"answer": [5]})
        pool.submit("b", [r"\boxed{9^{9^{9^9}}}"], {"answer": [5]})
        found = dict(pool.wait())
    assert found["a"][0].parts == {"math": 1.0}
    assert found["b"][0].parts == {"math": None}
    assert found["b"][0].failures == ["math: no result after 1 s"]


def test_a_pool_whose_workers_cannot_start_says_so(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import os\nprint(end='.', file=open('{tmp_path}/starts', 'a'), flush=True)\nos._exit(7)\n"
    )
    with RewardPool([RewardSettings(python=f"{tmp_path}/mine.py:f")], workers=1) as pool:
        pool.submit("a", ["x"], {})
        for _ in range(2):  # and says it again
            with pytest.raises(RunFailure, match=r"3 reward workers in a row .* ended with status 7"):
                pool.wait()
    assert len((tmp_path / "starts").read_text()) == 3


def test_without_rewards_for_workers_groups_are_returned_at_once():
    with RewardPool([RewardSettings(model="runs/rm")]) as pool:
        pool.submit("a", ["x"], {})
        [(key, [score])] = pool.wait()
    assert (key, score.total, score.parts) == ("a", None, {})


def test_a_worker_whose_trainer_ends_before_it_reads_a_message_ends_without_a_word(monkeypatch):
    for name in ("end_with_parent", "ignore_stop_signals"):  # of a process of its own
        monkeypatch.setattr(worker, name, lambda *_: None)
    ours, theirs = Pipe()
    ours.send_bytes(b"[]")
    ended = []
    thread = threading.Thread(target=lambda: ended.append(worker.main(os.dup(theirs.fileno()), 0)))
    thread.start()
    assert ours.poll(60)  # it is ready
    ours.close()
    theirs.close()
    thread.join(60)
    assert ended == [None]
