"""`megavlm data prepare` names what it cannot use."""

import json
from pathlib import Path

import pytest
from prepared import prepare, refused, talk, write

from megavlm.sources.shards import ShardFolder

pytestmark = pytest.mark.usefixtures("forked_indexing")


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
