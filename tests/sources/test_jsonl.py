"""Random access to the lines of a file."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megavlm.base import heartbeat
from megavlm.base.errors import UserError
from megavlm.sources import line_index
from megavlm.sources.jsonl import JsonlFile


def lines(tmp_path, content: bytes) -> JsonlFile:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return JsonlFile(path)


@pytest.mark.parametrize("block", [1 << 24, 7])
def test_lines_and_their_numbers(tmp_path, monkeypatch, block):
    monkeypatch.setattr(line_index, "_BLOCK", block)
    file = lines(tmp_path, '\n{"a": 1}\n   \r\n{"b": "ü\\n"}\r\n\n[1]'.encode())
    assert len(file) == 3
    assert [file.read(index)[0] for index in (2, 0, 1)] == [[1], {"a": 1}, {"b": "ü\n"}]
    assert [file.source(index).rpartition(":")[2] for index in range(3)] == ["2", "4", "6"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(UserError, match="is empty"):
        lines(tmp_path, content)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        JsonlFile(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        JsonlFile(tmp_path)


@pytest.mark.parametrize("line", [b'{"a": 1', b'{"a": "cut', b'{"a": "\xff"}', b"text", b"{} {}"])
def test_line_that_does_not_parse(tmp_path, line):
    file = lines(tmp_path, b"{}\n" + line + b"\n{}\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2: not valid JSON") as caught:
        file.read(1)
    assert "line 1" not in caught.value.message
    assert "control character" not in caught.value.message
    assert file.read(2)[0] == {}


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file of many pieces, of which an index is kept: its lines that are not blank, and its path."""
    monkeypatch.setattr(line_index, "_KEPT_FROM", 1)
    monkeypatch.setattr(line_index, "_PIECE", 50)
    monkeypatch.setattr(line_index, "_BLOCK", 13)
    monkeypatch.setenv("MEGAVLM_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    lines = [draw.choice(["", "  ", "\r", "1", '"' + "x" * draw.randrange(40) + '"']) for _ in range(200)]
    (tmp_path / "large.jsonl").write_bytes("\n".join(lines).encode())
    return [(n, line) for n, line in enumerate(lines, 1) if line.strip()], tmp_path / "large.jsonl"


def numbered(path):
    file = JsonlFile(path)
    return [(int(file.source(n).rpartition(":")[2]), json.dumps(file.read(n)[0])) for n in range(len(file))]


def test_an_interrupted_index_is_continued_from_its_pieces(large, tmp_path, monkeypatch):
    lines, path = large
    find = line_index._ends_in
    done = []

    def until_interrupted(file, start, stop):
        if start >= 300:
            raise KeyboardInterrupt
        done.append(start)
        return find(file, start, stop)

    monkeypatch.setattr(line_index, "_ends_in", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        JsonlFile(path)
    (parts,) = (tmp_path / "cache" / "lines").glob("*.parts")
    (parts / "0.npy").write_bytes(b"incomplete")  # is found again
    before, done[:] = set(done), []
    monkeypatch.setattr(line_index, "_ends_in", lambda *args: (done.append(args[1]), find(*args))[1])
    assert numbered(path) == lines
    assert before >= {50, 100}
    assert not set(done) & before - {0}
    assert not parts.exists()
    done.clear()
    assert numbered(path) == lines
    assert not done  # the index is kept


def test_one_process_of_a_machine_indexes_and_the_others_show_signs_of_life(large, monkeypatch):
    lines, path = large
    monkeypatch.setattr(line_index, "_WAIT", 0.01)
    find, started, indexed, heard = line_index._ends_in, threading.Barrier(2), [], []

    def slowly(file, start, stop):
        time.sleep(0.02)
        indexed.append(start)
        return find(file, start, stop)

    monkeypatch.setattr(line_index, "_ends_in", slowly)
    heartbeat.listen(heard.append)
    try:
        with ThreadPoolExecutor(2) as threads:  # flock counts each opened file for itself
            both = list(threads.map(lambda _: (started.wait(), numbered(path))[1], range(2)))
    finally:
        heartbeat.listen(None)
    assert both == [lines, lines]
    assert len(indexed) == len(set(indexed))
    assert any("from byte" in text for text in heard)
    assert any("by another process" in text for text in heard)
