"""The pool itself: what comes back, and what happens when ranks raise, die or hang."""

import os
import re
import subprocess
import sys
import time

import forkserver
import psutil
import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankError


def add_over_ranks(value):
    total = value.clone()
    dist.all_reduce(total)
    return dist.get_rank(), total, os.getpid()


def settings_of_a_worker():
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["RANK"], os.environ["WORLD_SIZE"]


def raise_on(ranks, message):
    if dist.get_rank() in ranks:
        raise ValueError(message)
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(17)
    dist.barrier()


def leave_rank_0_waiting():
    if dist.get_rank() == 0:
        wait_for_a_message_that_nobody_sends()


def wait_for_a_message_that_nobody_sends():
    dist.recv(torch.zeros(1), src=1)


def make_groups(count):
    for _ in range(count):
        dist.new_group([0, 1])
    return len(os.listdir("/proc/self/task"))


def start_parallel_state(tensor):
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)
    return parallel_state.get_tensor_model_parallel_rank()


def speak(text):
    print(text, dist.get_rank())


def start_a_child():
    print("child", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


@pytest.fixture
def pool():
    pool = Pool(2, timeout=60)
    yield pool
    pool.close()


def test_results_by_rank_from_the_same_processes(world4):
    first = world4.run(add_over_ranks, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _, _ in first] == [0, 1, 2, 3]
    assert all(torch.equal(total, torch.tensor([4.0, 8.0])) for _, total, _ in first)
    again = world4.run(add_over_ranks, value=torch.tensor([0.5]))
    assert [pid for _, _, pid in again] == [pid for _, _, pid in first]
    assert len({pid for _, _, pid in first} | {os.getpid()}) == 5


def test_one_thread_each(world2):
    assert world2.run(settings_of_a_worker) == [(1, "1", "0", "2"), (1, "1", "1", "2")]


def test_parallel_state_is_forgotten_between_calls(world4):
    assert world4.run(start_parallel_state, 4) == [0, 1, 2, 3]
    assert world4.run(start_parallel_state, 2) == [0, 1, 0, 1]


def test_process_groups_do_not_pile_up(world2):
    threads = [max(world2.run(make_groups, 10)) for _ in range(4)]
    assert threads[-1] <= threads[0]


def test_output_is_the_tests_output(world2, capfd):
    world2.run(speak, "hello from")
    output = capfd.readouterr().out
    assert "--- output of rank 1\nhello from 1" in output


def test_exception_everywhere_keeps_the_processes(pool):
    pids = [pid for _, _, pid in pool.run(add_over_ranks, torch.ones(1))]
    with pytest.raises(RankError, match=r"rank 1: (?s:.*)raise_on(?s:.*)ValueError: no good") as caught:
        pool.run(raise_on, [0, 1], "no good")
    assert isinstance(caught.value.exceptions[0], ValueError)
    assert [pid for _, _, pid in pool.run(add_over_ranks, torch.ones(1))] == pids


def test_exception_on_one_rank_frees_the_others(pool):
    with pytest.raises(RankError, match="ValueError: only here") as caught:
        pool.run(raise_on, [1], "only here")
    assert next(iter(caught.value.exceptions)) == 1  # the culprit comes first
    assert pool.run(add_over_ranks, torch.ones(1))[0][1].item() == 2.0


def test_death_of_a_rank(pool):
    with pytest.raises(RankError, match="rank 1: the process died with exit code 17"):
        pool.run(die_on, 1)
    assert pool.run(add_over_ranks, torch.ones(1))[0][1].item() == 2.0


def test_hang_is_cut_and_says_where(pool):
    pool.run(add_over_ranks, torch.ones(1))
    began = time.monotonic()
    with pytest.raises(RankError, match="for more than 2 s") as caught:
        pool.run(leave_rank_0_waiting, timeout=2)
    assert time.monotonic() - began < 20
    assert "wait_for_a_message_that_nobody_sends" in str(caught.value)
    assert list(caught.value.exceptions) == [0]
    assert pool.run(add_over_ranks, torch.ones(1))[0][1].item() == 2.0


def test_children_of_a_hung_rank_go_with_it(pool):
    with pytest.raises(RankError) as caught:
        pool.run(start_a_child, timeout=2)
    children = [int(pid) for pid in re.findall(r"child (\d+)", str(caught.value))]
    assert len(children) == 2
    for pid in children:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_function_must_be_importable(pool):
    with pytest.raises(TypeError, match="top level"):
        pool.run(lambda: None)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, forkserver\nfrom pool import Pool\nforkserver.PRELOAD = ['torch']\n"
        "def pid():\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    import parent\n    print(*Pool(2).run(parent.pid), flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(__file__), os.path.dirname(forkserver.__file__)])
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {pids} outlive their parent")
