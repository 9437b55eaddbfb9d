"""`megavlm data prepare`: what it writes is what it was given; what it cannot use it names."""

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from forkserver import forkserver
from PIL import Image

from megavlm.base.errors import UserError
from megavlm.cli.main import main
from megavlm.commands.data_prepare import parse_size
from megavlm.prepare import energon_process, index_shards
from megavlm.prepare.index_shards import find_shards, is_up_to_date
from megavlm.prepare.shard_folder import convert
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.shards import ShardFolder

ROOT = Path(__file__).parents[2]


def talk(content, answer="So it is."):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture(autouse=True, scope="module")
def forked_indexing():
    """Energon works in forks of a process that has imported it; in a new interpreter that takes seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_shards, "multiprocessing", SimpleNamespace(Pipe=multiprocessing.Pipe, get_context=_forking))
        yield


def _forking(method: str) -> SimpleNamespace:
    assert method == "spawn"

    def process(target, args, name):
        assert target is energon_process.index
        # what it prints goes where this process prints now; as connections, descriptors can be handed over
        outputs = [Connection(os.dup(number), readable=False) for number in (1, 2)]
        return forkserver().Process(target=_index, args=(outputs, *args), name=name)

    return SimpleNamespace(Process=process)


def _index(outputs, folder, shards, sender, parent):
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
    energon_process.index(folder, shards, sender, os.getppid())  # the server, which ends with the tests


@pytest.fixture(scope="module")
def records(media) -> list[dict]:
    """Every way to name a picture or video, one record each."""
    return [
        {"messages": talk("No picture at all — ünïcode 图片 🙂."), "id": 7, "score": 0.1, "half a pair": "\ud83d"},
        {"messages": talk("<image>" * len(media.pictures)), "images": media.pictures},
        {"messages": talk("<image><image><image>"), "images": ["large.jpg", "wide.png", "large.jpg"]},
        {"text": "A cat: <image> and a coin: <image>.", "images": ["turned.jpg", str(media.base / "grey.png")]},
        {"messages": talk("<video>What?<video>"), "videos": ["clip.mp4", "long.webm"]},
        {"messages": talk("<video>What?"), "videos": [media.frames]},
        {"messages": talk("<image><video>"), "videos": [{"frames": media.frames, "fps": 4}], "images": ["tall.gif"]},
        {"messages": talk("<video>"), "videos": [{"frames": "clip.mp4"}]},
        {
            "messages": talk(
                [
                    {"type": "image", "image": "cmyk.jpg"},
                    {"type": "text", "text": "and 0.jpg, not 1.png"},
                    {"type": "image"},
                    {"type": "video", "path": "clip.mp4"},
                    {"type": "video", "video": media.frames, "fps": 3},
                ]
            ),
            "images": ["tiny.webp"],
        },
        {"messages": talk([{"type": "image", "image": "alpha.png"}, {"type": "image", "image": "UPPER.PNG"}])},
        {"messages": talk("<image>"), "images": ["no ending"]},
    ]


@pytest.fixture(scope="module")
def jsonl(media, records) -> Path:
    Image.open(media.base / "wide.png").save(media.base / "UPPER.PNG")
    shutil.copy(media.base / "large.jpg", media.base / "no ending")
    return write(media.base / "all.jsonl", records)


@pytest.fixture(scope="module")
def shards(jsonl, tmp_path_factory) -> Path:
    """All records, in shards of few samples."""
    return convert([str(jsonl)], tmp_path_factory.mktemp("prepared") / "shards", parse_size("150kB"))


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """A copy of the prepared folder, to be changed."""
    return shutil.copytree(shards, tmp_path / "copied")


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(*arguments) -> int:
    return main(["data", "prepare", *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """The message with which the command ends with status 2."""
    assert prepare(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    return printed.err


# -- out of JSONL --------------------------------------------------------------------------------------------------


def test_samples_are_the_same_to_the_last_bit(jsonl, shards, renderer, records):
    before, after = JsonlFile(jsonl), ShardFolder(shards)
    assert len(after) == len(before) == len(records)
    for index, record in enumerate(records):
        kind = "pretrain" if "text" in record else "tune"
        old, new = (renderer.encode(*file.read(index), "here", kind=kind, index=index) for file in (before, after))
        for field in dataclasses.fields(old):
            first, second = getattr(old, field.name), getattr(new, field.name)
            same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
            assert same, f"{field.name} of {record}"


def test_members_are_the_files_themselves(media, shards, records):
    """Named in the order of the record, each file once, whatever it holds copied byte for byte."""
    assert len(list(shards.glob("shard-*.tar"))) > 2
    members = {}
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                members[member.name] = tar.extractfile(member).read()
    assert list(members) == sorted(members, key=lambda name: (name[:9], not name.endswith(".json"), name))

    def stored(index):
        return {name[10:]: data for name, data in members.items() if name.startswith(f"{index:09}.")}

    twice = stored(2)
    assert list(twice) == ["json", "0.jpg", "1.png"]
    assert twice["0.jpg"] == (media.base / "large.jpg").read_bytes()
    assert json.loads(twice["json"]) == records[2] | {"images": ["0.jpg", "1.png", "0.jpg"]}
    assert json.loads(stored(0)["json"]) == records[0]
    frames = {"videos": [{"frames": [f"{n}.png" for n in range(5)], "fps": 4}], "images": ["5.gif"]}
    assert json.loads(stored(6)["json"]) == records[6] | frames
    assert json.loads(stored(7)["json"])["videos"] == [{"frames": "0.mp4"}]
    assert stored(7)["0.mp4"] == (media.base / "clip.mp4").read_bytes()
    content = json.loads(stored(8)["json"])["messages"][0]["content"]
    assert content == [
        {"type": "image", "image": "0.jpg"},
        {"type": "text", "text": "and 0.jpg, not 1.png"},
        {"type": "image"},
        {"type": "video", "path": "1.mp4"},
        {"type": "video", "video": [f"{n}.png" for n in range(2, 7)], "fps": 3},
    ]
    assert json.loads(stored(8)["json"])["images"] == ["7.webp"]
    assert list(stored(9)) == ["json", "0.png", "1.png"]
    assert list(stored(10)) == ["json", "0.bin"]


def test_the_same_input_gives_the_same_bytes(jsonl, shards, tmp_path):
    again = convert([str(jsonl)], tmp_path / "again", parse_size("150kB"))
    for shard in shards.glob("*.tar*"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()


def test_shards_are_as_large_as_asked(shards):
    sizes = [shard.stat().st_size for shard in sorted(shards.glob("*.tar"))]
    counts = json.loads((shards / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert list(counts) == sorted(counts)
    # a shard is larger only by a single large sample or by the padding of tar
    assert all(
        size < 150_000 + tarfile.RECORDSIZE or count == 1 for size, count in zip(sizes, counts.values(), strict=True)
    )


def test_large_media_are_not_read_ahead(jsonl, shards, tmp_path, monkeypatch):
    """They go from file to file; the result is the same."""
    monkeypatch.setattr("megavlm.prepare.write_shards._READ_AHEAD", 0)
    streamed = convert([str(jsonl)], tmp_path / "streamed", parse_size("150kB"))
    for shard in shards.glob("*.tar"):
        assert shard.read_bytes() == (streamed / shard.name).read_bytes()


def test_several_files_in_their_order_and_urls(media, tmp_path, capsys):
    first = write(media.base / "first.jsonl", [{"text": f"one {n}"} for n in range(40)])
    second = write(media.base / "second.jsonl", [{"text": "<image>two", "images": ["tiny.webp"]}] * 2)
    assert prepare("--jsonl", f"file://{second}", first, "--out", tmp_path / "new/shards") == 0
    out, err = capsys.readouterr()
    assert f"ready: {tmp_path / 'new/shards'}, 42 samples in 1 shard\n" in out
    assert err == ""
    texts = [ShardFolder(tmp_path / "new/shards").read(index)[0]["text"] for index in range(42)]
    assert texts == ["<image>two"] * 2 + [f"one {n}" for n in range(40)]


@pytest.fixture
def broken(media) -> Path:
    """Four samples, of which the second and the third cannot be read."""
    file = media.base / "broken.jsonl"
    lines = ['{"text": "a"}', '{"text": "<image>", "images": ["none.png"]}', "{", '{"text": "b"}']
    file.write_text("\n".join(lines))
    return file


def test_a_broken_sample_is_named_and_nothing_is_left(broken, tmp_path, capsys):
    message = refused(capsys, "--jsonl", broken, "--out", tmp_path / "shards")
    assert f"{broken}:2: {broken.parent / 'none.png'} does not exist" in message
    assert "--skip-broken" in message
    broken.write_text(broken.read_text().replace("none.png", "tiny.webp"))
    assert f"{broken}:3: not valid JSON" in refused(capsys, "--jsonl", broken, "--out", tmp_path / "shards")
    assert not list(tmp_path.iterdir())


def test_broken_samples_are_left_out_and_listed(broken, tmp_path, capsys):
    out = tmp_path / "shards"
    assert prepare("--jsonl", broken, "--out", out, "--skip-broken") == 0
    assert "skipped: 2 broken samples, listed in" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in skipped] == [f"{broken}:2", f"{broken}:3"]
    assert skipped[0]["cause"] == f"{broken.parent / 'none.png'} does not exist"
    assert skipped[1]["cause"].startswith("not valid JSON")
    assert [ShardFolder(out).read(index)[0] for index in range(2)] == [{"text": "a"}, {"text": "b"}]
    assert (out / "shard-000000.tar").is_file()
    parts = tmp_path / "parts"
    assert prepare("--jsonl", broken, "--out", parts, "--skip-broken", "--workers", 2) == 0
    assert "skipped: 2 broken samples, listed in" in capsys.readouterr().out
    assert (parts / "skipped.jsonl").read_text() == (out / "skipped.jsonl").read_text()


def test_nothing_but_broken_samples(broken, tmp_path, capsys):
    broken.write_text("{")
    assert "no sample of" in refused(capsys, "--jsonl", broken, "--out", tmp_path / "shards", "--skip-broken")
    assert not list(tmp_path.iterdir())


def test_records_that_no_verb_reads_are_counted_and_all_of_them_refused(media, tmp_path, capsys):
    sharegpt, question = {"conversations": []}, {"messages": talk("What?")[:1]}
    file = write(media.base / "foreign.jsonl", [sharegpt] * 60)
    message = refused(capsys, "--jsonl", file, "--out", tmp_path / "shards")
    assert "none of 60 samples of" in message
    assert message.count("60 × broken: a sample must have either messages or text") == 1
    assert 'write {"messages": ' in message
    assert not list(tmp_path.iterdir())
    # questions are for infer; the last two are read, but of no form
    write(file, [question, *[{"messages": talk("What?")}] * 9, sharegpt, {"text": 3}])
    assert prepare("--jsonl", file, "--out", tmp_path / "shards") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 12 samples that were looked at cannot be used by any verb" in printed
    assert "1 × broken: text must be" in printed
    assert f"{file}:12" in printed


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


def test_an_existing_folder_is_left_alone(jsonl, tmp_path, capsys):
    out = tmp_path / "shards"
    out.mkdir()
    assert "shards exists already" in refused(capsys, "--jsonl", jsonl, "--out", out)
    assert list(tmp_path.iterdir()) == [out]


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


# -- of shards that are there --------------------------------------------------------------------------------------


def foreign(path: Path, names: list[str], **files: bytes) -> Path:
    """A tar file with the members `names`; what has no content in `files` has some text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = files.get(name.rpartition(".")[2], b'{"text": "x"}')
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_below_a_folder_by_name(tmp_path, capfd, media):
    picture = (media.base / "large.jpg").read_bytes()
    folder = tmp_path / "wds"
    foreign(folder / "b/1.x.tar", ["c.txt", "c.jpg"], txt=b"a picture of <video>", jpg=picture)
    foreign(folder / "a.tar", ["a/a.json", "a/b.json", "a/b.0.jpg"], jpg=picture)
    assert prepare(folder) == 0
    out, err = capfd.readouterr()
    assert f"ready: {folder}, 3 samples in 2 shards\n" in out
    assert out.count("\n") == 2  # and nothing of energon's
    assert err == ""
    file = ShardFolder(folder)
    sources = [file.source(index).removeprefix(f"{folder}/") for index in range(3)]
    assert sources == ["a.tar:1", "a.tar:2", "b/1.x.tar:1"]
    assert file.read(2)[0]["text"] == r"<image>a picture of \<video>"  # a text file has no marks of its own
    assert prepare(folder) == 0
    assert "is up to date: 3 samples in 2 shards" in capfd.readouterr().out


def test_members_named_elsewhere_are_not_listed_as_pictures(tmp_path):
    record = {"text": "<video>", "videos": [["0.jpg", "k.1.JPG"]], "url": "http://h/2.jpg"}
    foreign(tmp_path / "wds/a.tar", ["k.json", "k.0.jpg", "k.1.jpg", "k.2.jpg"], json=json.dumps(record).encode())
    assert prepare(tmp_path / "wds") == 0
    assert ShardFolder(tmp_path / "wds").read(0)[0] == {"images": ["2.jpg"]} | record


def test_up_to_date_and_not(copied, shards, capsys):
    names = [shard.name for shard in sorted(shards.glob("*.tar"))]
    index, last = copied / f"{names[0]}.idx", copied / names[-1]

    def runs(*flags) -> bool:
        assert prepare(copied, *flags) == 0
        out = capsys.readouterr().out
        assert ("is up to date" in out) != ("ready" in out)
        return "ready" in out

    assert not runs()
    assert runs("--force")
    os.utime(last)
    assert runs()
    assert not runs()
    last.rename(copied / "shard-000000a.tar")
    assert runs()
    assert list(json.loads((copied / ".nv-meta/.info.json").read_text())["shard_counts"])[1] == "shard-000000a.tar"
    index.write_bytes(index.read_bytes()[:-8])
    assert not is_up_to_date(copied, find_shards(copied))
    assert runs()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scramble(path: Path) -> None:
    """A header in the middle becomes nonsense, where tarfile takes the archive to be at its end."""
    with tarfile.open(path) as tar:
        second = list(tar)[1]
    with path.open("r+b") as file:
        file.seek(second.offset)
        file.write(b"\xff" * 512)


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize("damage", [cut, scramble, compress, lambda path: path.write_bytes(b"tar" * 500)])
def test_a_damaged_shard_is_named(copied, capfd, damage):
    damage(copied / "shard-000001.tar")
    message = refused(capfd, copied)
    assert "shard-000001.tar" in message
    assert "damaged" in message
    assert "shard-000000.tar" not in message
    assert not is_up_to_date(copied, find_shards(copied))
    with pytest.raises(UserError, match="megavlm data prepare"):
        ShardFolder(copied)


def test_a_shard_without_samples_and_samples_without_text(tmp_path, capfd):
    foreign(tmp_path / "a/empty.tar", [])
    assert "a/empty.tar cannot be used: it contains no samples" in refused(capfd, tmp_path / "a")
    foreign(tmp_path / "b/b.tar", ["k.jpg"])
    assert "none of 1 inspected samples can be used" in (message := refused(capfd, tmp_path / "b"))
    assert "KEY.json" in message


def test_shards_of_another_form_are_not_ready_also_when_they_are_indexed_already(tmp_path, capfd):
    unknown = b'{"dialogue": [{"speaker": "human", "says": "?"}]}'
    foreign(tmp_path / "c/c.tar", ["k.json", "l.json", "m.json"], json=unknown)
    for _ in range(2):
        message = refused(capfd, tmp_path / "c")
        assert "none of 3 inspected samples can be used" in message
        assert message.count("the record has no form that megavlm knows") == 1
        assert "3 × broken" in message


def test_a_key_that_comes_twice_is_named(copied, capfd):
    shutil.copy(copied / "shard-000000.tar", copied / "copy.tar")
    assert "have the same key '000000000'" in refused(capfd, copied)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to prepare"),
        (["gone"], "gone does not exist"),
        (["."], "has no *.tar files"),
        (["s3://bucket/shards"], "s3://bucket/shards is a URL"),
        (["x", "--out", "y", "--skip-broken"], "--out and --skip-broken without --jsonl would be ignored"),
        (["--jsonl", "x.jsonl"], "--jsonl requires --out DIR"),
        (["--jsonl", "x.jsonl", "--out", "y"], "data file x.jsonl does not exist"),
        (["d", "--jsonl", "x.jsonl", "--out", "y"], "the folder d together with --jsonl would be ignored"),
        (["--force", "--jsonl", "x.jsonl", "--out", "y"], "--force together with --jsonl would be ignored"),
        (["--jsonl", "x.jsonl", "--out", "y", "--shard-size", "5 parsecs"], "--shard-size is '5 parsecs'"),
        (["--jsonl"], "megavlm data prepare: --jsonl needs a value"),
        (["a", "b"], "megavlm data prepare does not take b"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2GiB", 2 << 30), ("64 k", 64_000), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
