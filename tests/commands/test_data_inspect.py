"""`megavlm data inspect`: its numbers against those worked out by hand.

In documents of digits every digit is a token, so that lengths are known without the tokenizer.
"""

import base64
import json
import re
from itertools import islice

import pytest
from inspected import digits, talk
from toy import picture, write_records

from megavlm.base.pools import in_processes
from megavlm.commands import data_inspect
from megavlm.commands.data_inspect import main
from megavlm.config.settings import DataSettings, Settings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.sources.blend import evenly


def test_evenly():
    assert evenly(5, 200) == [0, 1, 2, 3, 4]
    assert evenly(100, 4) == [12, 37, 62, 87]
    assert evenly(7, 1) == [3]
    assert evenly(0, 3) == []


def test_numbers(tmp_path, inspect, capsys):
    texts = write_records(tmp_path / "texts.jsonl", [digits(count) for count in (10, 20, 30, 40, 100)])
    large, small = picture(tmp_path, "chelsea", (128, 96)), picture(tmp_path, "coffee", (64, 32))
    pictures = write_records(
        tmp_path / "pictures.jsonl",
        [{"text": "1<image>2", "images": [large]}, {"text": "1<image><image>", "images": [small, small]}],
    )
    blend = [{"path": texts, "max_tokens": 500}, {"path": pictures, "weight": 3}]
    summary, _ = inspect({"train": blend})
    first, second = summary["sources"]

    assert (first["count"], first["looked_at"], first["usable"], first["share"]) == (5, 5, 5, 0.25)
    assert first["tokens"]["mean"] == 40
    assert first["tokens"]["percentiles"] == pytest.approx({"1": 10.4, "25": 20, "50": 30, "75": 40, "99": 97.6})
    assert first["tokens"]["max"] == 100
    assert first["targets_of_tokens"] == pytest.approx(195 / 200)  # the first of each is never predicted
    assert first["visual_of_tokens"] == 0
    assert first["picture_size"] is None

    # A token is 32 × 32 pixels: 4 × 3 = 12, and 2 × 1 = 2; each picture stands between two tokens that mark it, and
    # each text has an end. Targets are the end and what else is text, but the first token.
    assert second["tokens"]["mean"] == (2 + 2 + 12 + 1 + 1 + 2 * (2 + 2) + 1) / 2
    assert second["targets"]["mean"] == (2 + 1) / 2
    assert second["visual_of_tokens"] == pytest.approx(16 / 27)
    assert second["pictures"]["mean"] == 1.5
    assert second["picture_size"] == [64, 32]
    assert second["share"] == 0.75
    assert second["token_share"] == pytest.approx(0.75 * 13.5 / (0.75 * 13.5 + 0.25 * 40))
    assert second["target_share"] == pytest.approx(0.75 * 1.5 / (0.75 * 1.5 + 0.25 * 39))

    printed = " ".join(capsys.readouterr().out.split())
    assert "5 of 5 samples inspected" in printed
    assert "it ends after 500 tokens (max_tokens), about 2.5 passes over it" in printed
    assert "tokens 40 10 20 30 40 98 100" in printed
    assert "picture size: 64 × 32 px" in printed


@pytest.mark.parametrize(
    ("data", "fill", "samples"),
    [
        ({"seq_length": 100}, 0.9, 3),
        ({"seq_length": 100, "packing": "none", "packing_buffer": 1000}, 0.3, 1),
        ({"seq_length": 96, "pad_multiple": 48}, 60 / 96, 2),
    ],
)
def test_rows(tmp_path, inspect, data, fill, samples):
    texts = write_records(tmp_path / "texts.jsonl", [digits(30)] * 4)
    rows = inspect({"train": [{"path": texts}], **data})[0]["rows"]
    assert rows["fill"] == pytest.approx(fill)
    assert rows["samples"] == samples


def test_rows_are_of_the_blend_and_of_what_can_be_used(tmp_path, inspect):
    """One row holds two long samples or ten short ones: with nine short to a long one, rows of 5.5 on average."""
    long = write_records(tmp_path / "long.jsonl", [digits(50)] * 3)
    short = write_records(tmp_path / "short.jsonl", [digits(10), {"text": 3}])
    # The half of `short` that is broken is passed over: 18 drawn are 9 that can be used.
    summary, _ = inspect(
        {
            "train": [{"path": long}, {"path": short, "weight": 18}],
            **{"seq_length": 100, "pad_multiple": 2, "max_bad_fraction": 0.5},
        }
    )
    tokens_per_sample = (50 + 9 * 10) / 10
    rows = summary["rows"]
    assert rows["fill"] / rows["samples"] == pytest.approx(tokens_per_sample / 100, rel=0.05)
    assert summary["sources"][1]["token_share"] == pytest.approx(9 * 10 / (50 + 9 * 10))


def pairs(count):
    """Pairs of answers of many lengths."""
    return [
        {"prompt": "1 " * (1 + 7 * n % 40), "chosen": "2 " * (1 + n % 9), "rejected": "3 " * (1 + n % 23)}
        for n in range(count)
    ]


def test_rows_of_pairs_are_as_full_as_in_training(tmp_path, inspect, model_folder, capsys):
    """Against the first rows of a data worker, whose buffer grows; both answers fill them."""
    file = write_records(tmp_path / "pairs.jsonl", pairs(60))
    data = {"train": [{"path": file}], "seq_length": 512, "packing_buffer": 100}
    summary, _ = inspect(data)
    settings = DataSettings(**data, workers=0)
    loader = build_loader(settings, Renderer(model_folder, settings), "pair", dp_rank=0, dp_size=1, seed=1234)
    rows = list(islice(loader, summary["rows"]["rows"]))
    assert summary["rows"]["fill"] == pytest.approx(sum(row.num_tokens for row in rows) / 512 / len(rows))
    assert summary["rows"]["samples"] == pytest.approx(sum(row.num_samples for row in rows) / 2 / len(rows))
    assert summary["rows"]["fill"] > 0.9
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{summary['rows']['samples']:.1f} pairs per row" in printed
    (source,) = summary["sources"]
    lengths = [len(tokens) for tokens in renderings(Renderer(model_folder, settings), pairs(60))]
    assert source["tokens"]["mean"] == pytest.approx(sum(lengths) / 60)


def renderings(renderer, records):
    """The tokens of both answers of each pair, each with the prompt, by the chat template alone."""
    for record in records:
        talks = [talk(record["prompt"], record[side]) for side in ("chosen", "rejected")]
        texts = [renderer.processor.apply_chat_template(messages, tokenize=False) for messages in talks]
        yield [token for text in texts for token in renderer.tokenizer(text)["input_ids"]]


def test_samples_are_spread_over_the_source(tmp_path, inspect):
    texts = write_records(tmp_path / "texts.jsonl", [digits(count) for count in range(10, 110)])
    source = inspect({"train": [{"path": texts}]}, samples=4)[0]["sources"][0]
    assert (source["count"], source["looked_at"]) == (100, 4)
    assert source["tokens"]["mean"] == (22 + 47 + 72 + 97) / 4


def test_several_processes_write_what_one_does(tmp_path, model_folder, monkeypatch):
    """40 samples are three blocks; of one source the last sample is broken, and its pictures are inside the file."""
    texts = write_records(tmp_path / "texts.jsonl", [digits(count) for count in range(10, 48)])
    coffee = (tmp_path / picture(tmp_path, "coffee", (64, 32))).read_bytes()
    inside = f"data:image/png;base64,{base64.b64encode(coffee).decode()}"
    pictures = write_records(
        tmp_path / "pictures.jsonl", [{"text": "1<image>", "images": [name]} for name in (inside, "gone.png")]
    )
    data = {"train": [{"path": texts}, {"path": pictures}], "seq_length": 512, "max_bad_fraction": 0.5}
    made, found, processes = Settings(model={"hf": model_folder}, data=data), [], []
    monkeypatch.setattr(
        data_inspect, "in_processes", lambda *given: processes.append(given[1:3]) or in_processes(*given)
    )
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        assert main(made, out, workers=workers) == 0
        summary, page = ((out / name).read_text() for name in ("summary.json", "index.html"))
        assert page.count("a data worker takes") == 1
        page = re.sub(r"a data worker takes \S+ s for a row \(mean of \d+", "", page.partition("<footer>")[0])
        found.append([json.loads(summary) | {"worker": None}, page])
    assert processes == [(3, 1), (3, 2)]
    assert found[0] == found[1]
    assert found[0][1].count("<img") == 1


def test_nested_blend_replay_and_videos_of_frames(tmp_path, inspect):
    frames = [picture(tmp_path, name, (96, 64)) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    clips = write_records(tmp_path / "clips.jsonl", [{"messages": talk("<video>?", "Yes."), "videos": [frames]}])
    texts = write_records(tmp_path / "texts.jsonl", [digits(20)])
    old = write_records(tmp_path / "old.jsonl", [digits(30)])
    train = [{"path": texts}, {"sources": [{"path": clips}, {"path": texts, "name": "again"}], "weight": 3}]
    summary, page = inspect({"train": train, "replay": {"sources": [{"path": old}], "share": 0.2}}, samples=1)
    shares = {source["name"]: source["share"] for source in summary["sources"]}
    assert shares == pytest.approx({"texts": 0.2, "clips": 0.3, "again": 0.3, "old": 0.2})
    (clip,) = (source for source in summary["sources"] if source["name"] == "clips")
    assert (clip["videos"]["mean"], clip["video_frames"], clip["visual"]["max"]) == (1, 4, 2 * 3 * 2)
    chips = [text for _, _, text in page.articles[1] if "‹" in text]
    assert chips == [f"‹video 1, frame {step} of 2: 3 × 2 = 6 tokens›" for step in (1, 2)]
    assert sum(tag == "img" for tag, _ in page.tags) == 4  # all frames
