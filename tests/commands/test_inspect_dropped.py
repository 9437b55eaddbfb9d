"""`megavlm data inspect` counts and names samples that cannot be used, and refuses what it cannot do."""

import json

import pytest
from inspected import digits
from PIL import Image
from toy import picture, write_records

from megavlm.base.errors import UserError
from megavlm.commands.data_inspect import main
from megavlm.config.settings import Settings


def test_what_would_be_dropped(tmp_path, inspect, capsys):
    good = picture(tmp_path, "coffee", (64, 64))
    Image.open(tmp_path / good).save(tmp_path / "whole.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "whole.bmp").read_bytes()[:4000])  # its header is sound
    lines = [
        '{"text": "1234", "images": []',
        json.dumps({"text": "12<image>", "images": ["[red]gone[/red].png"]}),
        json.dumps({"text": "12<image>", "images": ["cut.bmp"]}),
        json.dumps(digits(101)),
        json.dumps({"text": ""}),
        json.dumps({"text": "12<image>", "images": [good]}),
        json.dumps(digits(100)),
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    too_many = r"of 7 inspected samples, 3 are broken \(42\.9 %\): more than data\.max_bad_fraction = 0\.2"
    summary, page = inspect({"train": [{"path": tmp_path / "mixed.jsonl"}], "seq_length": 100}, refused=too_many)
    (source,) = summary["sources"]
    assert {kind: len(found) for kind, found in source["dropped"].items()} == {
        "broken": 3,
        "too long": 1,
        "no target": 1,
    }
    assert [sample.rpartition(":")[2] for sample, _ in source["dropped"]["broken"]] == ["1", "2", "3"]
    assert "101 tokens" in source["dropped"]["too long"][0][1]
    assert (source["looked_at"], source["usable"], source["tokens"]["max"]) == (7, 2, 100)
    assert len(page.articles) == 2

    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped: 5 of the 7 inspected samples 3 broken" in printed
    assert "[red]gone[/red].png does not exist" in printed
    assert "1 more, listed on the page" in printed
    for cause in ("not valid JSON", "[red]gone[/red].png does not exist", "cut.bmp cannot be read"):
        assert cause in (tmp_path / "out/index.html").read_text()


def test_what_was_done_to_samples_is_told(tmp_path, inspect, capsys):
    words = write_records(tmp_path / "words.jsonl", [{"text": "12 <video>"}, {"text": "<image>"}, digits(9)])
    (source,) = inspect({"train": [{"path": words}]})[0]["sources"]
    assert (source["remarks"], source["usable"]) == ({"literal_marks": 2}, 3)
    assert "list no such files, so that these are words: 2" in " ".join(capsys.readouterr().out.split())


def test_a_source_without_any_good_sample(tmp_path, inspect, capsys):
    bad = write_records(tmp_path / "bad.jsonl", [{"text": 1}, {"messages": []}])
    summary, page = inspect({"train": [{"path": bad}]}, refused="sft can use none of 2 inspected samples")
    assert summary["rows"] is None
    assert summary["sources"][0]["tokens"] is None
    assert summary["sources"][0]["token_share"] is None
    assert page.articles == []
    assert "none of the inspected samples can be used" in capsys.readouterr().out


def test_refuses(tmp_path, model_folder):
    file = write_records(tmp_path / "texts.jsonl", [digits(10)])
    settings = Settings(model={"hf": model_folder}, data={"train": [{"path": file}]})
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        main(settings, tmp_path / "there")
    with pytest.raises(UserError, match="--samples is 0"):
        main(settings, tmp_path / "new", samples=0)
    assert not (tmp_path / "new").exists()
