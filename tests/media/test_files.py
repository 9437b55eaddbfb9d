"""Files by path and URL, whole and in pieces, and training data behind URLs."""

import json

import fsspec
import pytest
import torch
from PIL import Image

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.media.files import File, beside, in_folder


@pytest.fixture(params=["path", "memory"])
def stored(request, tmp_path):
    """Puts bytes somewhere and returns where."""
    memory = fsspec.filesystem("memory")

    def stored(name: str, data: bytes) -> str:
        if request.param == "path":
            (tmp_path / name).write_bytes(data)
            return str(tmp_path / name)
        memory.pipe(f"/store/{name}", data)
        return f"memory://store/{name}"

    yield stored
    if memory.exists("/store"):
        memory.rm("/store", recursive=True)


def test_whole_files_and_pieces(stored):
    data = bytes(range(200)) * 1000
    whole = File(stored("data.bin", data))
    piece = File(whole.url, 500, 150_000)
    assert whole.read() == data
    assert whole.read(3, 9) == data[3:9]
    assert piece.read() == data[500:150_000]
    assert piece.read(10, 20) == data[510:520]
    assert (whole.size(), piece.size()) == (200_000, 149_500)
    for file, expected in ((whole, data), (piece, data[500:150_000])):
        with file.open() as stream:
            assert stream.read(7) == expected[:7]
            stream.seek(-5, 2)
            assert stream.read() == expected[-5:]
            stream.seek(100_000)
            assert stream.read(70_000) == expected[100_000:170_000]
    with pytest.raises(OSError, match="ends after"):
        File(whole.url, 199_000, 201_000).read()


def test_names_beside_a_file(tmp_path):
    assert str(beside("a/b.jsonl", "c/d.png")) == "a/c/d.png"
    assert str(beside("b.jsonl", "d.png")) == "d.png"
    assert str(beside("s3://bucket/b.jsonl", "c/d.png")) == "s3://bucket/c/d.png"
    for absolute in ("/c/d.png", "s3://other/d.png"):
        assert str(beside("s3://bucket/b.jsonl", absolute)) == absolute
    assert str(in_folder(tmp_path)("d.png")) == f"{tmp_path}/d.png"


def test_rows_from_urls_are_those_from_paths(media, model_folder, stored):
    """JSONL, pictures of every kind and videos, behind a URL (in this process and in a worker)."""
    pictures = [{"text": "<image>" * 3, "images": media.pictures[n : n + 3]} for n in range(6)]
    records = [*pictures, {"text": "<video>!", "videos": ["clip.mp4"]}, {"text": "<video>", "videos": [media.frames]}]
    for name in [*media.pictures, *media.frames, "clip.mp4"]:
        stored(name, (media.base / name).read_bytes())
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (media.base / "by-path.jsonl").write_bytes(lines)
    rows = {}
    for path in (media.base / "by-path.jsonl", stored("by-url.jsonl", lines)):
        settings = DataSettings(train=[{"path": path}], seq_length=4096, packing="none", shuffle=False, workers=1)
        loader = build_loader(settings, Renderer(model_folder, settings), "pretrain", dp_rank=0, dp_size=1, seed=0)
        rows[str(path)] = [next(loader) for _ in records]
        loader.close()
    for one, other in zip(*rows.values(), strict=True):
        assert not one.skipped_samples
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.input_ids, other.input_ids)


def test_messages_for_urls(model_folder):
    settings = DataSettings(train=[{"path": "memory://none/data.jsonl"}])
    renderer = Renderer(model_folder, settings)
    with pytest.raises(UserError, match=r"data file memory://none/data\.jsonl does not exist"):
        build_loader(settings, renderer, "tune", dp_rank=0, dp_size=1, seed=0)
    settings = DataSettings(train=[{"path": "nothing://none/data.jsonl"}])
    with pytest.raises(UserError, match="nothing"):
        build_loader(settings, renderer, "tune", dp_rank=0, dp_size=1, seed=0)


def test_pictures_are_read_from_their_headers(stored, monkeypatch):
    """The size of a large picture costs some kilobytes, not the file."""
    image = Image.effect_noise((2000, 1500), 60).convert("RGB")
    path = stored("noise.jpg", b"")
    with fsspec.open(path, "wb") as file:
        image.save(file, "JPEG", quality=95)
    read = []
    original = File.read
    monkeypatch.setattr(File, "read", lambda self, *a: read.append(len(data := original(self, *a))) or data)
    from megavlm.media.pictures import Picture

    assert Picture(File(path), "here:1").size() == (1500, 2000)
    assert sum(read) <= 1 << 17
    assert File(path).size() > 1 << 20
