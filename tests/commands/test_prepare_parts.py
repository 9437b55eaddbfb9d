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
from megavlm.prepare import in_parts, shard_folder
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
    assert "shard_bytes" in refused(capsys, "--jsonl", file, "--out", jobs, "--part", "2/3", "--shard-size", "1MB")
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


def read_all(folder: Path) -> list:
    shards = ShardFolder(folder)
    return [shards.read(index)[0] for index in range(len(shards))]


def test_a_job_of_an_array_writes_its_part_by_several_processes(media, tmp_path):
    """Nodes with other numbers of cores; what they write is joined as ever, in the order of the samples."""
    file = write(media.base / "nodes.jsonl", [{"text": f"{number}"} for number in range(11)])
    for part, workers in {"2/3": 2, "1/3": 1, "3/3": 3}.items():
        assert prepare("--jsonl", file, "--out", tmp_path / "out", "--part", part, "--workers", workers) == 0
    assert len(read_all(tmp_path / "out/part-0003-of-0003")) == 4  # a part can be used alone
    assert prepare(tmp_path / "out") == 0
    assert [record["text"] for record in read_all(tmp_path / "out")] == [f"{number}" for number in range(11)]
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("part-*-of-*"))
    inner = [f"part-0002-of-0003/part-000{n}-of-0002" for n in (1, 2)]
    inner += [f"part-0003-of-0003/part-000{n}-of-0003" for n in (1, 2, 3)]
    assert found == sorted([*inner, *(f"part-000{n}-of-0003" for n in (1, 2, 3))])


@pytest.mark.parametrize("part", [(), ("--part", "1/1"), ("--part", "2/2")])
def test_what_is_complete_is_kept_after_an_error(media, tmp_path, capsys, monkeypatch, part):
    """A broken sample ends the command; repaired, its part alone is written, whatever the number of cores."""
    monkeypatch.setattr(in_parts, "SMALL", 2)
    monkeypatch.setattr(in_parts, "num_cores", lambda: 2)
    good = [{"text": f"number {number}"} for number in range(32)]
    file = write(media.base / "repaired.jsonl", good)
    whole = tmp_path / "whole"
    assert prepare("--jsonl", file, "--out", whole, "--workers", 1) == 0
    text = file.read_text()
    file.write_text(text.replace('"number 31"}', '"number 31";'))  # as long
    command = ("--jsonl", file, "--out", tmp_path / "out", *part)
    capsys.readouterr()
    assert "repaired.jsonl:32" in refused(capsys, *command)
    folder = tmp_path / "out" if part != ("--part", "2/2") else tmp_path / "out/part-0002-of-0002.partial"
    complete = sorted(folder.glob("part-*"))
    assert [path.name for path in complete] == [f"part-{n:04}-of-0008" for n in range(1, 8)]
    before = [(path / "shard-000000.tar").stat() for path in complete]
    file.write_text(text)
    monkeypatch.setattr(in_parts, "num_cores", lambda: 3)
    assert prepare(*command) == 0
    folder = tmp_path / "out" if part != ("--part", "2/2") else tmp_path / "out/part-0002-of-0002"
    after = [(folder / path.name / "shard-000000.tar").stat() for path in complete]
    assert all(map(os.path.samestat, after, before))
    assert read_all(folder) == read_all(whole)[-16 if part == ("--part", "2/2") else 0 :]
    assert not list(tmp_path.rglob("*.partial*"))


def test_few_samples_are_written_by_one_process_and_many_by_all_cores(media, tmp_path, monkeypatch):
    monkeypatch.setattr(in_parts, "SMALL", 8)
    monkeypatch.setattr(in_parts, "num_cores", lambda: 2)
    for number, parts in {7: 0, 8: 2, 24: 3, 80: 8}.items():
        file = write(media.base / "several.jsonl", [{"text": "one"}] * number)
        assert prepare("--jsonl", file, "--out", tmp_path / f"{number}") == 0
        assert len(list((tmp_path / f"{number}").glob("part-*"))) == parts
        assert len(read_all(tmp_path / f"{number}")) == number


@pytest.mark.parametrize("command", [(), ("--part", "2/2")])
def test_the_remedy_of_a_broken_sample_helps(media, tmp_path, capsys, monkeypatch, command):
    """Where no part became complete, and where some did: those have no broken sample."""
    monkeypatch.setattr(in_parts, "SMALL", 2)
    for name, broken in {"all": range(16), "some": (15,)}.items():
        texts = [f'{{"text": "{number}"' + ("}" if number not in broken else ";") for number in range(16)]
        file = media.base / f"{name}.jsonl"
        file.write_text("\n".join(texts) + "\n")
        made = ("--jsonl", file, "--out", tmp_path / name, "--workers", 2, *command)
        capsys.readouterr()
        for _ in range(2):  # for the sample, and not because the folder exists
            assert f"{file}:" in refused(capsys, *made)
        if name == "some":
            assert prepare(*made, "--skip-broken") == 0
            out = tmp_path / name / "part-0002-of-0002" if command else tmp_path / name
            assert len(read_all(out)) == (7 if command else 15)
        else:
            assert f"no sample of {file} can be read" in refused(capsys, *made, "--skip-broken")


def test_a_part_without_a_usable_sample_does_not_end_the_others(media, tmp_path, capsys, monkeypatch):
    """As little as for one process: the whole counts."""
    monkeypatch.setattr(shard_folder, "_LOOKED_AT", 1)  # of shards; those that are written are all counted
    records = [{"text": "<image>", "images": ["gone.png"]}] * 2 + [{"form": "unknown"}] * 2 + [{"text": "good"}] * 2
    out, file = tmp_path / "out", write(media.base / "odd.jsonl", records)
    assert prepare("--jsonl", file, "--out", out, "--workers", 3, "--skip-broken") == 0
    assert read_all(out) == [{"form": "unknown"}] * 2 + [{"text": "good"}] * 2
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 2
    told = capsys.readouterr().out
    assert "skipped: 2 broken samples" in told
    assert "2 of 4 samples that were looked at cannot be used" in told
    write(file, records[:2])
    none = ("--jsonl", file, "--out", tmp_path / "none", "--workers", 2, "--skip-broken")
    assert "odd.jsonl can be read" in refused(capsys, *none)
    assert not (tmp_path / "none").exists()


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
    options = ["--jsonl", str(file), "--out", str(tmp_path / "out"), "--workers", "1"]
    command = [sys.executable, "-m", "megavlm", "data", "prepare", *options]
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
