"""What the first and the second signal do to a process, in processes of their own."""

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.base import stop_signals

ROOT = Path(__file__).parents[2]
JOB = """
import sys, time
from megavlm.base import stop_signals
from megavlm.base.stop_signals import watched
stop_signals._ECHO_SECONDS = 0.4
with watched() as signals:
    if {deferring}: signals.defer()
    print("ready", flush=True)
    {wait}
"""
# "kernel": in one call for long, as in a collective, so that handlers of Python do not run
WAITS = {"python": "time.sleep(20)", "kernel": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**7)"}


@pytest.fixture
def start():
    processes = []

    def start(*, deferring, wait="python", **variables):
        job = JOB.format(deferring=deferring, wait=WAITS[wait])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        process = subprocess.Popen(
            [sys.executable, "-c", job], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_before_the_first_step_a_signal_ends_the_process_at_once_with_one_line(start, number, name, wait):
    process = start(deferring=False, wait=wait)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert err == f"error: ended by {name} before the first step of this start; no checkpoint was written\n"


@pytest.mark.parametrize(
    ("first", "second", "ended"),
    [
        (signal.SIGINT, signal.SIGINT, "a second Ctrl-C"),
        (signal.SIGTERM, signal.SIGTERM, "a second SIGTERM"),
        (signal.SIGUSR1, signal.SIGTERM, None),  # as SLURM sends them; the checkpoint may be under way
    ],
)
def test_then_the_first_asks_and_the_second_ends(start, first, second, ended):
    process = start(deferring=True, wait="kernel" if ended else "python")
    process.send_signal(first)
    time.sleep(0.1)
    process.send_signal(second)  # the echo of a launcher
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(second)
    time.sleep(0.2 if ended is None else 0)
    assert ended or process.poll() is None
    if ended:
        _, err = process.communicate(timeout=10)
        assert process.returncode == 128 + second
        assert err.startswith("stopping after this step")
        assert err.count("\n") == 2
        assert f"error: ended by {ended}; the steps since the newest checkpoint are lost\n" in err


def test_of_many_ranks_the_first_speaks(start):
    process = start(deferring=False, RANK="1")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 130


def test_a_run_with_a_progress_bar_is_told_through_it():
    signals, told = stop_signals.StopSignals(quiet=False), queue.Queue()
    signals.speak = told.put
    signals.defer()
    signals.receive(signal.SIGINT)
    assert told.get(timeout=10) == "stopping after this step (press Ctrl-C again to stop at once)"


def test_a_step_that_has_changed_nothing_is_left():
    """Unless it may not be left; and a step that has begun to change something is finished."""
    for may_leave in (True, False):
        signals, told = stop_signals.StopSignals(quiet=False), queue.Queue()
        signals.speak, signals.may_leave = told.put, may_leave
        signals.defer()
        with signals.leavable():
            assert not signals.is_leaving
            signals.receive(signal.SIGTERM)
            assert signals.is_leaving == may_leave
        assert not signals.is_leaving
        with_it = "stopping without this step, whose answers are sampled again when the run continues"
        assert told.get(timeout=10) == (with_it if may_leave else "stopping after this step")
