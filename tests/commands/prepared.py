"""What the tests of `megavlm data prepare` share. The fixtures are known to all tests of this folder."""

import json
import multiprocessing
import os
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from forkserver import forkserver
from PIL import Image

from megavlm.cli.main import main
from megavlm.commands.data_prepare import parse_size
from megavlm.prepare import energon_process, index_shards
from megavlm.prepare.shard_folder import convert


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
