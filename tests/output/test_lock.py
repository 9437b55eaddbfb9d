"""Of two starts that would write into one output folder at the same time, the second is refused."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from megavlm.base import file_lock as lock_module
from megavlm.base.errors import UserError
from megavlm.output.lock import RunLock, check_unlocked


def hold(folder, ready, child):
    """In another process: takes the lock, and forks a process that outlives it a little, as a data worker does."""
    with RunLock(folder) as lock:
        lock.take()
        if child and os.fork() == 0:
            time.sleep(0.3)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """holder(child): a process that holds the lock of tmp_path / "run"."""
    processes = []

    def holder(*, child=False):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        processes.append(context.Process(target=hold, args=(tmp_path / "run", ready, child)))
        processes[-1].start()
        assert ready.wait(30)
        return processes[-1]

    yield holder
    for process in processes:
        process.kill()
        process.join()


def test_a_second_start_is_refused_with_host_and_process(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock_module, "_RELEASE_SECONDS", 0.2)
    process = holder()
    for start in (lambda: check_unlocked(tmp_path / "run"), lambda: RunLock(tmp_path / "run").take()):
        with pytest.raises(UserError) as caught:
            start()
        assert f"is in use by process {process.pid} on {socket.gethostname()}; its last sign" in caught.value.message
        assert "remove" not in caught.value.remedy  # it is alive: a dead one's lock on this host is taken over


@pytest.mark.parametrize("child", [False, True])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, child):
    process = holder(child=child)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / "run.lock").exists()
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        found = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    assert list((tmp_path / "run").iterdir()) == []


def of_another_host(folder, age):
    folder.mkdir()
    file = folder / "run.lock"
    file.write_text('{"host": "gpu07", "pid": 4711, "started": 0}\n')
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_the_lock_of_another_host_holds_as_long_as_it_is_renewed(tmp_path, monkeypatch):
    file = of_another_host(tmp_path / "run", age=100)
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: os.utime(file))  # it gives a sign of life
    with pytest.raises(UserError, match=r"is in use by process 4711 on gpu07; its last sign of life was 0 s ago"):
        RunLock(tmp_path / "run").take()
    assert "gpu07" in file.read_text()


@pytest.mark.parametrize("age", [100, 3600])
def test_the_lock_of_a_dead_host_is_taken_over(tmp_path, monkeypatch, age):
    """At once if it was not renewed for long; otherwise after waiting for a sign of life."""
    file = of_another_host(tmp_path / "run", age)
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 0.3)
    began = time.monotonic()
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert (time.monotonic() - began > 0.3) == (age == 100)


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        file = tmp_path / "run" / "run.lock"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 30
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
