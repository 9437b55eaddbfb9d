"""Two `megavlm data prepare` into one folder at the same time: the second is refused, and the first one ends well.

The first waits for a picture, which is a named pipe, until the second has ended. A pipe cannot be used in the end, so
its sample is left out.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forkserver import forkserver
from PIL import Image

from megavlm.cli.main import main
from megavlm.prepare import index_shards
from megavlm.sources.shards import ShardFolder

MODES = {
    "whole": [],
    "two processes": ["--workers", "2"],
    "one of two parts": ["--part", "1/2"],
    "two processes of one of two parts": ["--workers", "2", "--part", "1/2"],
}
KEPT = [f"Number {number}: <image>." for number in (0, 2, 3, 4, 5)]  # that of the pipe is broken


@pytest.fixture
def place(tmp_path):
    """A folder with a data file of six samples, and the pictures; the second sample's comes through a pipe."""
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "there.png")
    os.mkfifo(tmp_path / "late.png")
    names = ["late.png" if number == 1 else "there.png" for number in range(6)]
    records = [{"text": f"Number {number}: <image>.", "images": [name]} for number, name in enumerate(names)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def start(place):
    """start(arguments): `megavlm data prepare` as a process, which prints to the file errors."""
    processes = []

    def start(arguments: list[str]):
        processes.append(forkserver().Process(target=_command, args=(arguments, place / "errors")))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def _command(arguments: list[str], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # Energon's process, too, is forked: an interpreter would import everything again.
    forking = SimpleNamespace(Pipe=multiprocessing.Pipe, get_context=lambda _: multiprocessing.get_context("fork"))
    index_shards.multiprocessing = forking
    sys.exit(main(["data", "prepare", *arguments]))


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.002)


def go_on(process, pipe: Path) -> None:
    """Whoever reads the pipe finds its end."""
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it
            time.sleep(0.01)


def status(process) -> int | None:
    process.join(120)
    return process.exitcode


def texts(folder: Path) -> list[str]:
    shards = ShardFolder(folder)
    return [shards.read(index)[0]["text"] for index in range(len(shards))]


def is_refused(process, place: Path, what: str, holder: int) -> None:
    assert status(process) == 2
    told = (place / "errors").read_text()
    assert told.startswith(f"error: {what} is in use by process {holder} on {socket.gethostname()}; its last sign of")
    assert told.count("error: ") == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_second_is_refused_and_a_killed_one_blocks_nobody(place, start, mode):
    out = place / "shards"
    arguments = ["--jsonl", str(place / "data.jsonl"), "--out", str(out), "--skip-broken", *MODES[mode]]
    folder = out if mode == "whole" else out / "part-0001-of-0002"
    job = "of two parts" in mode
    first = start(arguments)
    wait_for(folder.with_name(f"{folder.name}.partial"))
    is_refused(start(arguments), place, str(folder if job else out), first.pid)
    assert first.is_alive()
    if job:  # the other part does not have to wait
        assert status(start([*arguments[:-1], "2/2"])) == 0
    if mode != "whole":
        first.kill()
        first.join()
        assert list(place.rglob("*.lock"))
        first = start(arguments)
        wait_for(folder.with_name(f"{folder.name}.partial"))
    go_on(first, place / "late.png")
    assert status(first) == 0, (place / "errors").read_text()
    if job:
        assert status(start([str(out)])) == 0
    assert texts(out) == KEPT
    assert not list(place.rglob("*.lock"))


def test_a_folder_is_indexed_by_one_at_a_time(place, start):
    shards = place / "shards"
    shards.mkdir()
    for number in range(2):
        (place / "0.json").write_text(json.dumps({"text": f"{number} <image>", "images": ["png"]}))
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            tar.add(place / "0.json", f"{number}.json")
            tar.add(place / "there.png", f"{number}.png")
    first = start([str(shards)])
    lock = shards / "indexing.lock"
    wait_for(lock)
    while not lock.read_text():  # stopped before it has written its id, it would be refused as an unknown process
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    is_refused(start([str(shards)]), place, f"the index of {shards}", first.pid)
    os.kill(first.pid, signal.SIGCONT)
    assert status(first) == 0
    assert texts(shards) == ["0 <image>", "1 <image>"]
    assert not list(place.rglob("*.lock"))
