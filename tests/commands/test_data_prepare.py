"""`megavlm data prepare` out of JSONL: what it writes is what it was given; mistakes on its command line."""

import dataclasses
import json
import tarfile

import pytest
import torch
from prepared import prepare, refused, write

from megavlm.commands.data_prepare import parse_size
from megavlm.prepare.shard_folder import convert
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.shards import ShardFolder

pytestmark = pytest.mark.usefixtures("forked_indexing")


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


def test_an_existing_folder_is_left_alone(jsonl, tmp_path, capsys):
    out = tmp_path / "shards"
    out.mkdir()
    assert "shards exists already" in refused(capsys, "--jsonl", jsonl, "--out", out)
    assert list(tmp_path.iterdir()) == [out]


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
