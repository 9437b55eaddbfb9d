"""Pictures of samples that are known by their names only: beside a data file, and in a shard."""

import io
import struct
import tarfile

import pytest
from PIL import Image

from megavlm.base.errors import UserError
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.sources.previews import looks_like_video, media_of, preview


def size_of(named, sample, access=ANY_LOCAL_FILE):
    return preview(named, looks_like_video(named), media_of(sample, access), sample).size


def test_beside_a_data_file(media):
    sample = f"{media.base}/train.jsonl:12"
    assert size_of("tiny.webp", sample) == (17, 5)
    assert size_of("turned.jpg", sample) == (400, 200)  # upright
    assert size_of("clip.mp4", sample) == (96, 64)
    assert size_of(media.frames, sample) == size_of({"frames": media.frames, "fps": 2}, sample) == (80, 48)
    with pytest.raises(UserError, match="does not exist"):
        size_of("gone.png", sample)
    with pytest.raises(UserError, match=r"outside of data\.media_roots"):
        size_of("tiny.webp", sample, MediaAccess((f"{media.base}/elsewhere",)))


def test_in_a_shard(tmp_path):
    """The second sample of a shard that is written by hand."""
    shard = tmp_path / "shard-000000.tar"
    with tarfile.open(shard, "w") as tar:
        for key, width in (("a", 10), ("b", 20)):
            Image.new("RGB", (width, 8)).save(data := io.BytesIO(), "PNG")
            for name, content in ((f"{key}.json", b"{}"), (f"{key}.0.png", data.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(shard) as tar:
        starts = [member.offset for member in tar if member.name.endswith(".json")]
        end = tar.offset
    (tmp_path / "shard-000000.tar.idx").write_bytes(struct.pack("<QQQ", *starts, end))
    assert [size_of("0.png", f"{shard}:{number}") for number in (1, 2)] == [(10, 8), (20, 8)]
    with pytest.raises(UserError, match=r"tar:7: cannot be read"):
        size_of("0.png", f"{shard}:7")
