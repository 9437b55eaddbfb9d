"""`megavlm data prepare` in parts, killed and interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forkserver import forkserver
from prepared import prepare, refused, talk, write

from megavlm.cli.main import main
from megavlm.commands.data_prepare import parse_size
from megavlm.prepare.shard_folder import convert
from megavlm.sources.shards import ShardFolder

pytestmark = pytest.mark.usefixtures("forked_indexing")


ROOT = Path(__file__).parents[2]


def test_parts_are_joined_to_the_same_samples(media, tmp_path, capsys):
    """By jobs of an array, one of which is run twice, and by processes of one machine."""
    records = [{"messages": talk(f"<image>{number}?"), "images": ["wide.png"]} for number in range(7)]
    file = write(media.base / "parts.jsonl", records)
    whole, jobs, processes = (tmp_path / name for name in ("whole", "jobs", "processes"))
    assert prepare("--jsonl", file, "--out", whole) == 0
    for part in ("1/3", "3/3", "2/3", "3/3"):
        assert prepare("--jsonl", file, "--out", jobs, "--part", part) == 0
    assert prepare(jobs) == 0
    assert prepare("--jsonl", file, "--out", processes, "--workers", 2) == 0
    read = lambda folder: [ShardFolder(folder).read(index)[0] for index in range(len(ShardFolder(folder)))]
    assert len(read(whole)) == 7
    assert read(jobs) == read(processes) == read(whole)
    assert sorted(path.name for path in jobs.glob("part-*")) == [f"part-000{n}-of-0003" for n in (1, 2, 3)]
    capsys.readouterr()
    assert "leave one out" in refused(capsys, "--jsonl", file, "--out", "x", "--workers", 2, "--part", "1/2")
    assert "shard_bytes" in refused(capsys, "--jsonl", file, "--out", jobs, "--part", "2/3", "--shard-size", "1MB")
    assert "parts" in refused(capsys, "--jsonl", file, "--out", jobs, "--workers", 2)
    other = write(media.base / "other.jsonl", [*records, {"text": "one more"}])
    assert "(inputs)" in refused(capsys, "--jsonl", other, "--out", jobs, "--workers", 3)
    (jobs / "part-0002-of-0003").rename(jobs / "part-0002-of-0003.partial")
    assert "run --part 2/3 again" in refused(capsys, jobs)
    shutil.rmtree(jobs / "part-0002-of-0003.partial")
    assert "lacks 1 of 3 parts: 2/3" in refused(capsys, jobs)
    (jobs / "part-0001-of-0003").rename(jobs / "part-0002-of-0002")
    assert "made from other files or settings (parts)" in refused(capsys, jobs)
    assert "choose fewer parts" in refused(capsys, "--jsonl", file, "--out", tmp_path / "x", "--part", "1/9")
    assert "--part is" in refused(capsys, "--jsonl", file, "--out", tmp_path / "x", "--part", "9")


def test_writing_goes_on_after_a_kill(media, tmp_path):
    """kill -9 while one of two processes waits for a picture: the complete part is kept, the other one written anew."""
    names = ["wide.png"] * 5 + ["late.png"]
    records = [{"messages": talk(f"<image>{number}?"), "images": [name]} for number, name in enumerate(names)]
    file, late, out = write(media.base / "killed.jsonl", records), media.base / "late.png", tmp_path / "out"
    os.mkfifo(late)
    command = ["data", "prepare", "--jsonl", str(file), "--out", str(out), "--workers", "2"]
    process = forkserver().Process(target=_command, args=(command,))
    process.start()
    complete, deadline = out / "part-0001-of-0002", time.monotonic() + 300
    while not (complete.exists() and (out / "part-0002-of-0002.partial").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    before = (complete / "shard-000000.tar").stat()
    late.unlink()
    shutil.copy(media.base / "wide.png", late)
    assert prepare(*command[2:]) == 0
    assert os.path.samestat((complete / "shard-000000.tar").stat(), before)
    assert not list(tmp_path.rglob("*.partial"))
    whole = convert([str(file)], tmp_path / "whole", parse_size("1MB"))
    read = lambda folder: [ShardFolder(folder).read(index)[0] for index in range(len(ShardFolder(folder)))]
    assert len(read(whole)) == 6
    assert read(out) == read(whole)


def _command(arguments: list[str]) -> None:
    sys.exit(main(arguments))


@pytest.mark.parametrize("folder", ["writing", "indexing"])
def test_ctrl_c_leaves_nothing(media, tmp_path, folder):
    """While samples are written and while they are indexed, in a process of its own."""
    number = 100_000 if folder == "writing" else 1000
    file = write(tmp_path / "many.jsonl", [{"text": f"{n}"} for n in range(number)])
    command = [sys.executable, "-m", "megavlm", "data", "prepare", "--jsonl", str(file), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores the signal, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial, deadline = tmp_path / "out.partial", time.monotonic() + 60
    sign = partial / ("shard-000000.tar" if folder == "writing" else ".nv-meta")
    while not sign.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: ended by Ctrl-C\n")
    assert list(tmp_path.iterdir()) == [file]
