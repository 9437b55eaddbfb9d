"""The page of `megavlm data inspect`, read as a browser reads it."""

import base64
import io

from inspected import digits, talk
from PIL import Image
from toy import picture, write_records

from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.inspection.sample_cards import level_of


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
