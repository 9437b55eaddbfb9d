"""Random access to lines, and samples in file order."""

import json

import pytest

from megavlm.base.errors import UserError
from megavlm.data import jsonl
from megavlm.data.jsonl import JsonlFile
from megavlm.data.sources import read_samples


def lines(tmp_path, content: bytes) -> JsonlFile:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return JsonlFile(path)


@pytest.mark.parametrize("block", [1 << 24, 7])
def test_lines_and_their_numbers(tmp_path, monkeypatch, block):
    monkeypatch.setattr(jsonl, "_BLOCK", block)
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


@pytest.mark.parametrize("line", [b'{"a": 1', b'{"a": "\xff"}', b"text", b"{} {}"])
def test_line_that_does_not_parse(tmp_path, line):
    file = lines(tmp_path, b"{}\n" + line + b"\n{}\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2: not valid JSON"):
        file.read(1)
    assert file.read(2)[0] == {}


def test_samples_in_file_order(tmp_path, renderer):
    texts = ["one", "two", "three", "four", "five"]
    file = lines(tmp_path, "\n".join(json.dumps({"text": text}) for text in texts).encode())
    samples = list(read_samples(file.path, renderer, "pretrain"))
    assert [renderer.tokenizer.decode(sample.input_ids) for sample in samples] == [
        f"{text}<|endoftext|>" for text in texts
    ]
    assert [sample.index for sample in samples] == [0, 1, 2, 3, 4]
    mine = list(read_samples(file.path, renderer, "pretrain", rank=1, num_ranks=2))
    assert [(sample.index, sample.source) for sample in mine] == [(1, f"{file.path}:2"), (3, f"{file.path}:4")]
