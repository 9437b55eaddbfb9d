"""A process that makes no progress shows its stacks and ends; one that does is left alone."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.base import heartbeat
from megavlm.monitor.hang_watch import HangWatch, collective_minutes

SCRIPT = """
import re, sys, time
from pathlib import Path
from megavlm.base import heartbeat
from megavlm.monitor.hang_watch import HangWatch

def sleeps():
    time.sleep(60)

def keeps_the_lock():  # a regular expression of exponential time: no other Python thread runs meanwhile
    re.match("(a+)+$", "a" * 60 + "b")

with HangWatch(float(sys.argv[2]) / 60, Path(sys.argv[3]), 3, 8) as watch:
    watch.heartbeat("step 12")
    globals()[sys.argv[1]]()
"""


def ended(function: str, seconds: float, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, function, str(seconds), str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_sleeping_process_shows_its_stacks_and_ends(tmp_path):
    began = time.monotonic()
    done = ended("sleeps", 1.0, tmp_path / "run")
    assert time.monotonic() - began < 40  # and not 60
    assert done.returncode == 1
    text = (tmp_path / "run" / "stacks" / "rank3.txt").read_text()
    for told in (done.stderr, text):
        assert "rank 3 of 8 on " in told
        assert "since step 12" in told
        assert "in sleeps" in told
        assert told.count("most recent call first") == 3  # the two threads of the watch are among them


def test_a_process_that_no_thread_can_run_in_ends_too(tmp_path):
    done = ended("keeps_the_lock", 1.0, tmp_path / "run")
    assert done.returncode == 1
    assert "in keeps_the_lock" in done.stderr


def test_signs_of_progress_keep_it_alive(tmp_path):
    with HangWatch(1.0 / 60, tmp_path, 0, 1) as watch:
        for number in range(6):
            time.sleep(0.5)
            watch.heartbeat(f"step {number}")
    time.sleep(1.5)  # nor does it fire once the run has ended
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_waits_for_one_that_works_is_left_alone_and_both_end_when_neither_works(tmp_path):
    """As while one rank indexes a file for hours and the others wait in a collective."""
    (tmp_path / "config.yaml").touch()
    code = """
import sys, time
from pathlib import Path
from megavlm.base import heartbeat
from megavlm.monitor.hang_watch import HangWatch

output = Path(sys.argv[2])
while sys.argv[1] == "1" and not (output / ".alive").exists():
    time.sleep(0.01)  # both are watched at the same time, however long each needed to start
with HangWatch(1.5 / 60, output, int(sys.argv[1]), 2):
    began = time.monotonic()
    while sys.argv[1] == "0" and time.monotonic() < began + 5:
        heartbeat.beat("a piece")  # from deep within a library
        time.sleep(0.2)
    time.sleep(60)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, rank, str(tmp_path)]) for rank in "01"]
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    ends = [(tmp_path / "stacks" / f"rank{rank}.txt").stat().st_mtime for rank in (0, 1)]
    assert ends[1] > ends[0] - 2.5  # alone, the one that waits would have ended about five seconds before the other
    texts = [(tmp_path / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "since a piece" in texts[0]
    assert "since the start of the process" in texts[1]


def test_bytes_that_are_read_are_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_LOOK", 0.02)
    heard = []
    heartbeat.listen(heard.append)
    try:
        with heartbeat.while_bytes_flow("loading the weights"):
            time.sleep(0.2)
            quiet = len(heard)
            for number in itertools.count():
                (tmp_path / "file").write_bytes(bytes(1 << 20))
                if len(heard) > quiet + 2 or number > 10**4:
                    break
    finally:
        heartbeat.listen(None)
    assert not quiet
    assert set(heard) == {"loading the weights (bytes were read or written)"}


def test_bytes_that_a_child_writes_are_a_sign_of_life(tmp_path, monkeypatch):
    """As while the run waits for its last checkpoint, which a child process writes."""
    monkeypatch.setattr(heartbeat, "_LOOK", 0.02)
    heard = []

    def write():
        for _ in range(25):
            (tmp_path / "file").write_bytes(bytes(1 << 20))
            time.sleep(0.02)
        assert not heartbeat._listener  # a child has no watch

    heartbeat.listen(heard.append)
    try:
        child = multiprocessing.get_context("fork").Process(target=write)
        child.start()
        with heartbeat.while_bytes_flow("writing a checkpoint", child.pid):
            child.join()
    finally:
        heartbeat.listen(None)
    assert child.exitcode == 0
    assert len(heard) > 2


def test_null_is_off(tmp_path):
    with HangWatch(None, tmp_path, 0, 1) as watch:
        watch.heartbeat("step 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minutes", [0.1, 30.0, 1000.0])
def test_it_comes_before_the_timeout_of_collectives(minutes):
    assert collective_minutes(minutes) > minutes + 1


def test_every_group_waits_so_long(tmp_path):
    """Groups of gloo and NCCL have defaults of their own, which would end a run before the watch does."""
    script = """
import datetime, torch.distributed as dist
from megavlm import platform
from megavlm.config.settings import ParallelSettings
groups = platform.init(ParallelSettings(), timeout_minutes=77)
named = (groups.world_host, groups.model_parallel, groups.model_parallel_host, groups.language.tp)
for group in (dist.group.WORLD, *named):
    options = group._get_backend(platform.device()).options
    assert options._timeout == datetime.timedelta(minutes=77), (group, options._timeout)
"""
    environment = {**os.environ, "MEGAVLM_PLATFORM": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
