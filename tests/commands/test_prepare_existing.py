"""`megavlm data prepare` on shards that are there: indexed by name, up to date, damaged."""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from prepared import prepare, refused

from megavlm.base.errors import UserError
from megavlm.prepare.index_shards import find_shards, is_up_to_date
from megavlm.sources.shards import ShardFolder

pytestmark = pytest.mark.usefixtures("forked_indexing")


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
