"""`megavlm data inspect`: its numbers against those worked out by hand, and its page read as a browser reads it.

In documents of digits every digit is a token, so that lengths are known without the tokenizer.
"""

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import islice

import pytest
from PIL import Image
from toy import picture, write_records

from megavlm.base.errors import UserError
from megavlm.base.pools import in_processes
from megavlm.commands import data_inspect
from megavlm.commands.data_inspect import main
from megavlm.config.settings import DataSettings, Settings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.demo.model_folder import make_model_folder
from megavlm.report.inspect_cards import level_of
from megavlm.sources.blend import evenly

VOID = {"meta", "img", "br", "rect", "path"}  # the last two close themselves in SVG


class Page(HTMLParser):
    """The tags of a page; fails where they are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.articles = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "article":
            self.articles.append([])
        if tag == "span" and self.in_tokens() and self.open[-1][0] == "div":
            self.articles[-1].append([attrs.get("class", ""), attrs.get("title", ""), ""])
        if tag not in VOID:
            self.open.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.in_tokens() and self.open[-1][0] == "span":
            self.articles[-1][-1][2] += data

    def in_tokens(self):
        return any(tag == "article" for tag, _ in self.open) and ("div", {"class": "tokens"}) in self.open


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def inspect(tmp_path, model_folder):
    """Runs the job on files of records; gives summary and page. ``refused``: a pattern of the error at the end."""

    def run(data, samples=200, refused=None, **settings):
        data = {"train": [], "seq_length": 512, "packing_buffer": 8, **data}
        out = tmp_path / "out"
        made = Settings(model={"hf": model_folder}, data=data, **settings)
        if refused is None:
            assert main(made, out, samples) == 0
        else:
            with pytest.raises(UserError, match=refused):
                main(made, out, samples)
        assert sorted(path.name for path in out.iterdir()) == ["index.html", "summary.json"]
        return json.loads((out / "summary.json").read_text()), Page((out / "index.html").read_text())

    return run


def digits(count):
    """A text of this many tokens, the last of which is its end."""
    return {"text": ("1234567890" * (count // 10 + 1))[: count - 1], "images": []}


def talk(question, answer, **answered):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **answered}]


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


def test_both_answers_are_on_the_page_and_one_source_has_one_bar(tmp_path, inspect):
    record = {"prompt": "Who is it?", "chosen": "An astronaut.", "rejected": "A pirate."}
    _, page = inspect({"train": [{"path": write_records(tmp_path / "pairs.jsonl", [record])}]})
    (spans,) = page.articles
    learned = "".join(text for classes, _, text in spans if "w3" in classes.split())
    assert learned == "An astronaut.<|im_end|>A pirate.<|im_end|>"
    assert "".join(text for _, _, text in spans).count("Who is it?") == 1
    html = (tmp_path / "out/index.html").read_text()
    assert [html.count(f">{word}</span>") for word in ("chosen", "rejected")] == [1, 1]
    assert "pairs per row" in html
    assert sum(tag == "div" and attrs.get("class") == "share" for tag, attrs in page.tags) == 1


def test_labelled_answers_are_on_the_page_with_the_one_that_does_not_match(tmp_path, inspect):
    records = [{"prompt": f"{n}?", "completion": f"Is {n}.", "label": n == 1} for n in (1, 2)]
    _, page = inspect({"train": [{"path": write_records(tmp_path / "judged.jsonl", records)}]})
    learned = ["".join(text for classes, _, text in spans if "w3" in classes.split()) for spans in page.articles]
    assert learned == ["Is 1.<|im_end|>Is 2.<|im_end|>", "Is 2.<|im_end|>Is 1.<|im_end|>"]
    html = (tmp_path / "out/index.html").read_text()
    assert [html.count(f">{word}</span>") for word in ("desirable", "undesirable")] == [1, 1]
    assert html.count("answer of the next sample, for the KL term") == 2


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


def test_page_shows_the_sample_as_it_is_learned(tmp_path, inspect, model_folder):
    large = picture(tmp_path, "astronaut", (512, 256))
    messages = [
        *talk("<image>Was ist das? <b>&amp;", "图片 🙂 ça\n\nva <i>?", weight=0.25),
        *talk("And?", "<think>not learned", loss=False),
        *talk("3 👩‍🚀?", "Learned — 字", weight=1.0),
    ]
    record = {"messages": messages, "images": [large]}
    file = write_records(tmp_path / "talk.jsonl", [record])
    _, page = inspect({"train": [{"path": file}]})
    (spans,) = page.articles

    settings = Settings(model={"hf": model_folder}, data={"seq_length": 512})
    renderer = Renderer(model_folder, settings.data)
    sample = renderer.encode(record, lambda named: _file(tmp_path / named), "here:1", kind="tune")
    text = renderer.tokenizer.decode(sample.input_ids)
    run = "<|image_pad|>" * len(sample.visual_positions)
    assert run in text
    shown = "".join(text for _, _, text in spans)
    assert shown == text.replace(run, "‹image 1: 11 × 5 = 55 tokens›")
    assert len(sample.visual_positions) == 55

    for weight, kind in ((0.25, "w1"), (1.0, "w3")):
        learned = renderer.tokenizer.decode(sample.labels[sample.loss_weights == weight])
        assert "".join(text for classes, _, text in spans if kind in classes.split()) == learned
    assert not any({"w2", "w4", "w5"} & set(classes.split()) for classes, _, _ in spans)
    marked = {text for classes, _, text in spans if "special" in classes.split()}
    assert marked == {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<think>"}

    # The titles name all tokens but the visual ones, in order.
    titles = [line for classes, title, _ in spans if classes != "visual" for line in title.split("\n")]
    targets = {int(p) + 1 for p in (sample.labels != IGNORE).nonzero()[:, 0]}
    visual = set(sample.visual_positions.tolist())
    weights = sample.loss_weights.roll(1).tolist()
    assert titles == [
        f"#{place} · id {token} · " + (f"weight {weights[place]:g}" if place in targets else "not a target")
        for place, token in enumerate(sample.input_ids.tolist())
        if place not in visual
    ]


def _file(path):
    from megavlm.media.files import File

    return File(str(path))


def test_page_needs_no_other_file(tmp_path, inspect):
    large = picture(tmp_path, "astronaut", (640, 480))
    file = write_records(tmp_path / "talk.jsonl", [{"messages": talk("<image>?", "Yes."), "images": [large]}] * 9)
    _, page = inspect({"train": [{"path": file}]})
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(page.articles) == len(sources) == 6
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 240)
    assert not [tag for tag, attrs in page.tags if tag in ("link", "script") or "url(" in attrs.get("style", "")]
    assert all(attrs["href"].startswith("#") for _, attrs in page.tags if "href" in attrs)


def test_all_text_is_learned_in_pretraining(tmp_path, inspect):
    file = write_records(tmp_path / "talk.jsonl", [{"messages": talk("Who?", "An astronaut.")}])
    summary, page = inspect({"train": [{"path": file}]}, stage=1)
    assert summary["kind"] == "pretrain"
    (spans,) = page.articles
    assert ["w3" in classes for classes, _, _ in spans] == [False] + [True] * (len(spans) - 1)


def test_long_samples_are_shortened(tmp_path, inspect):
    file = write_records(tmp_path / "long.jsonl", [digits(3000)])
    _, page = inspect({"train": [{"path": file}], "seq_length": 3000})
    (spans,) = page.articles
    assert [text for classes, _, text in spans if classes == "gap"] == ["… 600 pieces of text are omitted here …"]
    assert len(spans) == 2401
    assert spans[-1][1].startswith("#2999 ")


def test_weights_have_shades():
    assert [level_of(weight) for weight in (0, 0.01, 0.25, 0.5, 1, 2, 4, 100)] == [0, 1, 1, 2, 3, 4, 5, 5]


def test_refuses(tmp_path, model_folder):
    file = write_records(tmp_path / "texts.jsonl", [digits(10)])
    settings = Settings(model={"hf": model_folder}, data={"train": [{"path": file}]})
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        main(settings, tmp_path / "there")
    with pytest.raises(UserError, match="--samples is 0"):
        main(settings, tmp_path / "new", samples=0)
    assert not (tmp_path / "new").exists()
