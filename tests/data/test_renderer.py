"""Rendered samples against the Hugging Face processor called with the same messages."""

import json
import re

import numpy as np
import pytest
import torch
from hf_reference import assert_equal, patches_of, reference, talk, written
from PIL import Image, ImageOps
from transformers import AutoProcessor

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.data.targets import media_tokens

RECORDS = {
    "text": {"messages": talk("Hello?", "Good morning.\n\nMore — ünïcode 图片 🙂.", system="Be brief.")},
    "empty system": {"messages": talk("Hi", "Ho", system="")},
    "one picture": {"messages": talk("<image>What is it?", "A woman."), "images": ["large.jpg"]},
    "turns": {
        "messages": talk("<image>\nand <image>?", "Two.", "And <image>", "", "Thanks <image>", "Bye\n"),
        "images": ["wide.png", "grey.png", "alpha.png", "tall.gif"],
    },
    "formats": {"messages": talk("<image>" * 8, "Eight."), "images": "all"},
    "video": {"messages": talk("<video>What happens?", "A cat passes."), "videos": ["clip.mp4"]},
    "video without a frame count": {"messages": talk("Look: <video>", "Yes."), "videos": ["long.webm"]},
    "frames": {"messages": talk("<video>?", "It turns."), "videos": ["frames"]},
    "mixture": {
        "messages": talk("<video><image>a<video>", "b", "<image>", "c"),
        "images": ["turned.jpg", "tiny.webp"],
        "videos": ["long.webm", "frames"],
    },
    "parts": {
        "messages": talk(
            [{"type": "text", "text": "Is <image> "}, {"type": "image", "image": "cmyk.jpg"}, {"type": "image"}],
            [{"type": "text", "text": "yes"}],
        ),
        "images": ["tiny.webp"],
    },
}


@pytest.fixture(params=RECORDS)
def record(request, media):
    record = dict(RECORDS[request.param])
    if record.get("images") == "all":
        record["images"] = media.pictures
    if "videos" in record:
        record["videos"] = [media.frames if named == "frames" else named for named in record["videos"]]
    return record


@pytest.mark.parametrize("kind", ["tune", "pretrain"])
def test_equals_the_processor(renderer, model_folder, media, record, kind):
    processor = AutoProcessor.from_pretrained(model_folder)
    sample = renderer.encode(record, media.find, "here:1", kind=kind)
    assert_equal(sample, reference(processor, record, media.base))


def test_tuning_targets_are_the_assistant_turns(renderer, media, record):
    sample = renderer.encode(record, media.find, "here:1", kind="tune")
    tokenizer = renderer.tokenizer
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    ids, end = sample.input_ids.tolist(), tokenizer.convert_tokens_to_ids("<|im_end|>")
    is_target = np.zeros(len(ids), dtype=bool)
    for start in range(len(ids)):
        if ids[start : start + len(header)] == header:
            first = start + len(header)
            is_target[first : ids.index(end, first) + 1] = True
    expected = torch.where(torch.from_numpy(is_target), sample.input_ids, IGNORE).roll(-1)
    expected[-1] = IGNORE
    assert is_target.any()
    torch.testing.assert_close(sample.labels, expected)
    torch.testing.assert_close(sample.loss_weights, (expected != IGNORE).float())


def test_pretraining_targets_are_all_text(renderer, model_folder, media, record):
    """As the template writes it, without the first token and without what stands for pictures and videos."""
    sample = renderer.encode(record, media.find, "here:1", kind="pretrain")
    whole = written(AutoProcessor.from_pretrained(model_folder), record)
    assert renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE]) == whole.removeprefix("<|im_start|>")
    assert ((sample.labels == sample.input_ids.roll(-1)) | (sample.labels == IGNORE)).all()
    assert sample.labels[-1] == IGNORE


def test_document(renderer, media):
    record = {"text": "A coin <image> and\n<image>.", "images": ["grey.png", "tiny.webp"]}
    sample = renderer.encode(record, media.find, "here:1", kind="pretrain")
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = renderer.processor(
        text=[record["text"].replace("<image>", mark) + "<|endoftext|>"],
        images=[Image.open(media.base / name).convert("RGB") for name in record["images"]],
        return_tensors="pt",
    )
    torch.testing.assert_close(sample.input_ids, expected["input_ids"][0])
    torch.testing.assert_close(patches_of(sample), expected["pixel_values"], rtol=0, atol=0)
    assert renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE]) == " coin  and\n.<|endoftext|>"


def test_a_document_has_an_end_that_is_learned(renderer, make_renderer, media):
    end = renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for kind in ("pretrain", "tune"):
        for text in ("One.", "One.<|endoftext|>"):
            sample = renderer.encode({"text": text}, media.find, "here:1", kind=kind)
            assert sample.input_ids.tolist() == [*renderer.tokenizer("One.")["input_ids"], end]
            assert sample.labels[-2:].tolist() == [end, IGNORE]
            assert sample.loss_weights[-2:].tolist() == [1, 0]
    for settings, kind in (({"append_eos": False}, "pretrain"), ({}, "prompt")):
        other = make_renderer(seq_length=64, **settings).encode({"text": "One."}, media.find, "here:1", kind=kind)
        assert other.input_ids.tolist() == renderer.tokenizer("One.")["input_ids"]


def test_time_stamps_are_not_learned(renderer, media):
    """Not by pretraining, nor where a template writes videos into answers, nor with a weight."""
    for record in (
        {"text": "<video>A cat passes.", "videos": ["clip.mp4"]},
        {"text": "<video>A <image> passes.", "videos": [media.frames], "images": ["wide.png"]},
    ):
        sample = renderer.encode(record, media.find, "here:1", kind="pretrain")
        assert "seconds>" in renderer.tokenizer.decode(sample.input_ids)
        learned = renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE])
        assert learned == record["text"].replace("<video>", "").replace("<image>", "") + "<|endoftext|>"


@pytest.mark.parametrize("pieces", [["A", " ", "<", "0", ".2>"], ["A", " <", "0", ".2>"]], ids=["apart", "one token"])
def test_a_space_before_a_time_stamp_may_share_its_token(pieces):
    """Qwen's own vocabulary has the token " <". It was learned, and told that a clip follows."""
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    tokens = np.arange(len(pieces), dtype=np.int32)
    ((first, behind),) = media_tokens(tokens, starts, [{"new_span": (2, sum(map(len, pieces)))}], ends=(-1, -2))
    assert "".join(pieces[first:behind]).strip() == "<0.2>"


def test_media_in_a_weighted_answer_are_not_learned(model_folder, media):
    renderer = Renderer(model_folder, DataSettings(seq_length=4096))
    renderer.processor.chat_template = renderer.processor.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in [m.content] if m.content is string %}{{ p }}"
        "{% endfor %}{% for p in m.content if m.content is not string %}{{ p.text if p.type == 'text' else "
        "'<|vision_start|><|' + p.type + '_pad|><|vision_end|>' }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    record = {"messages": talk("Draw.", "Here: <video> and <image>!"), "videos": ["clip.mp4"], "images": ["wide.png"]}
    record["messages"][1]["weight"] = 0.5
    sample = renderer.encode(record, media.find, "here:1", kind="tune")
    assert renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE]) == "Here:  and !<|im_end|>"
    assert set(sample.loss_weights.tolist()) == {0.0, 0.5}


def test_prompt_ends_where_the_answer_begins(renderer, model_folder, media):
    record = {"messages": talk("<image>?", "One.", "Sure?", "Yes."), "images": ["wide.png"]}
    sample = renderer.encode(record, media.find, "here:1", kind="prompt")
    asked = record | {"messages": record["messages"][:-1]}
    expected = reference(AutoProcessor.from_pretrained(model_folder), asked, media.base, prompt=True)
    torch.testing.assert_close(sample.input_ids, expected["input_ids"][0])
    assert (sample.labels == IGNORE).all()


def test_loss_can_be_switched_off_and_weighted(renderer, media):
    messages = talk("a", "bb", "c", "dd", "e", "ff")
    messages[1]["loss"] = False
    messages[3]["weight"] = 0.25
    sample = renderer.encode({"messages": messages}, media.find, "here:1", kind="tune")
    learned = {
        weight: renderer.tokenizer.decode(sample.labels[sample.loss_weights == weight]) for weight in (0.25, 1.0)
    }
    assert learned == {0.25: "dd<|im_end|>", 1.0: "ff<|im_end|>"}
    assert ((sample.labels != IGNORE) == (sample.loss_weights > 0)).all()


def test_tools_and_tool_calls(renderer, media):
    call = {"type": "function", "function": {"name": "count", "arguments": {"what": "coins"}}}
    messages = [
        {"role": "user", "content": "<image>How many?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "24"},
        {"role": "assistant", "content": "24 coins."},
    ]
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    record = {"messages": messages, "images": ["grey.png"], "tools": tools}
    sample = renderer.encode(record, media.find, "here:1", kind="tune")
    learned = renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE])
    assert re.fullmatch(r'<tool_call>\n\{"name": "count".*\}\n</tool_call><\|im_end\|>24 coins.<\|im_end\|>', learned)


def test_pixel_limits_are_the_processors(make_renderer, media):
    record = {"messages": talk("<image>", "!"), "images": ["large.jpg"]}
    small = make_renderer(seq_length=4096, max_pixels=64 * 64).encode(record, media.find, "here:1", kind="tune")
    assert small.frame_grids.tolist() == [[4, 4]]
    record["images"] = ["tiny.webp"]
    large = make_renderer(seq_length=4096, min_pixels=96 * 96).encode(record, media.find, "here:1", kind="tune")
    assert large.frame_grids.prod() * 16 * 16 >= 96 * 96


def test_video_limits(make_renderer, media):
    record = {"messages": talk("<video>", "!"), "videos": ["long.webm"]}  # 5 seconds
    for settings, frames in ({"video_fps": 1.0}, 5), ({"video_fps": 4.0}, 20), ({"video_max_frames": 3}, 3):
        sample = make_renderer(seq_length=4096, **settings).encode(record, media.find, "here:1", kind="tune")
        assert len(sample.frame_grids) == (frames + 1) // 2


def test_frames_with_their_own_rate(renderer, media):
    record = {"messages": talk("<video>", "!"), "videos": [{"frames": media.frames[:4], "fps": 2.0}]}
    same = renderer.encode(record, media.find, "here:1", kind="tune")
    record["videos"] = [media.frames[:4]]
    torch.testing.assert_close(renderer.encode(record, media.find, "here:1", kind="tune").input_ids, same.input_ids)
    record["videos"] = [{"frames": media.frames[:4], "fps": 4}]
    text = renderer.tokenizer.decode(renderer.encode(record, media.find, "here:1", kind="tune").input_ids)
    assert "<0.1 seconds>" in text


def test_boxes_are_written_in_thousandths(renderer, media):
    """wide.png is 300 × 40; turned.jpg lies on its side, and boxes count its pixels as a viewer sees it."""
    width, height = ImageOps.exif_transpose(Image.open(media.base / "turned.jpg")).size
    record = {
        "messages": talk("<image>Where? <box>", '{"bbox_2d": <box>, "label": "cat"}', "<image> and here?", "At <box>."),
        "images": ["wide.png", "turned.jpg"],
        "boxes": [[0, 0, 300, 40], [30, 10, 150, 20], [width / 4, height / 2]],
    }
    sample = renderer.encode(record, media.find, "here:1", kind="tune")
    text = renderer.tokenizer.decode(sample.input_ids)
    assert "Where? [0, 0, 1000, 1000]" in text
    assert '{"bbox_2d": [100, 250, 500, 500], "label": "cat"}' in text
    assert "At [250, 500]." in text
    record["boxes"][2] = {"box": [30, 10], "image": 0}
    assert "At [100, 250]." in renderer.tokenizer.decode(
        renderer.encode(record, media.find, "here:1", kind="tune").input_ids
    )
    document = {"text": "<box> in <image>", "images": ["wide.png"], "boxes": [[150, 20]]}
    assert renderer.tokenizer.decode(
        renderer.encode(document, media.find, "here:1", kind="pretrain").input_ids
    ).startswith("[500, 500] in ")


def test_beginnings_are_cut_away_but_never_through_a_picture(make_renderer, media):
    """Every length from a few tokens to all: the rest is the end of the whole sample, media and targets with it."""
    record = {
        "messages": talk("<image>one <image>", "two", "Then <video>?", "three", "<image>four", "five"),
        "images": ["wide.png", "turned.jpg", "wide.png"],
        "videos": [media.frames],
    }
    settings = {"max_pixels": 64 * 64}
    whole = make_renderer(seq_length=4096, **settings).encode(record, media.find, "here:1", kind="tune")
    total, counts = len(whole.input_ids), set()
    for seq_length in range(12, total + 3):
        renderer = make_renderer(seq_length=seq_length, too_long="truncate", **settings)
        sample = renderer.encode(record, media.find, "here:1", kind="tune")
        length = len(sample.input_ids)
        assert length <= seq_length
        assert sample.input_ids.tolist() == whole.input_ids[total - length :].tolist()
        assert sample.labels.tolist() == whole.labels[total - length :].tolist()
        assert torch.equal(sample.pixels, whole.pixels[len(whole.pixels) - len(sample.pixels) :])
        num_patches = len(patches_of(sample))
        assert num_patches == 4 * len(sample.visual_positions)
        assert sample.frame_grids.prod(dim=1).sum() == num_patches
        starts = (sample.input_ids == renderer.processor.vision_start_token_id).sum()
        ends = (sample.input_ids == renderer.processor.vision_end_token_id).sum()
        assert starts == ends == len(sample.frame_grids) + sample.num_videos  # a video has a pair of its own
        assert sample.num_videos in (0, 1)
        if sample.num_videos:
            assert len(sample.frame_grids) >= 3  # all frames of it
        counts.add((sample.num_images, sample.num_videos))
        assert sample.position_ids[:, 0].tolist() == [0, 0, 0]
    assert counts == {(0, 0), (1, 0), (1, 1), (2, 1), (3, 1)}


BROKEN = {
    "too many pictures": ({"messages": talk("<image>", "!"), "images": ["wide.png", "wide.png"]}, "contains 1 <image>"),
    "too few pictures": ({"messages": talk("<image><image>", "!"), "images": ["wide.png"]}, "contains 2 <image>"),
    "no pictures": ({"messages": talk("<image>", "!")}, "contains 1 <image>, but images has 0 entries"),
    "picture in an answer": ({"messages": talk("?", "<image>"), "images": ["wide.png"]}, "only into user messages"),
    "placeholder in the text": ({"messages": talk("<|image_pad|>", "!")}, "remove <|image_pad|>"),
    "missing picture": ({"messages": talk("<image>", "!"), "images": ["no.png"]}, r"no\.png does not exist"),
    "not a picture": ({"messages": talk("<image>", "!"), "images": ["clip.mp4"]}, r"clip\.mp4 cannot be read"),
    "truncated picture": ({"messages": talk("<image>", "!"), "images": ["cut.jpg"]}, r"cut\.jpg cannot be read"),
    "truncated png": ({"messages": talk("<image>", "!"), "images": ["cut.png"]}, r"cut\.png cannot be read"),
    "line of a picture": ({"messages": talk("<image>", "!"), "images": ["line.png"]}, "aspect ratio"),
    "not a video": ({"messages": talk("<video>", "!"), "videos": ["wide.png"]}, "video"),
    "missing frame": ({"messages": talk("<video>", "!"), "videos": [["frame0.png", "no.png"]]}, "does not exist"),
    "one frame": ({"messages": talk("<video>", "!"), "videos": [["frame0.png"]]}, "has a single frame"),
    "frames of two sizes": ({"messages": talk("<video>", "!"), "videos": [["frame0.png", "wide.png"]]}, "differ in"),
    "rate of a file": ({"messages": talk("<video>", "!"), "videos": [{"frames": "clip.mp4", "fps": 2}]}, "own rate"),
    "too long": ({"messages": talk("?", "word " * 5000)}, r"has \d+ tokens .* data.seq_length = 4096"),
    "empty text": ({"text": ""}, "no target token"),
    "no answer": ({"messages": talk("?")}, "no assistant message that contributes"),
    "slip in a field": ({"messages": talk("<image>", "!"), "image": ["wide.png"]}, "did you mean 'images'"),
    "text and messages": ({"messages": talk("?", "!"), "text": "x"}, "both"),
    "neither": ({"conversation": []}, "neither"),
    "no role": ({"messages": [{"from": "human", "value": "?"}]}, "no role"),
    "unknown role": ({"messages": [{"role": "human", "content": "?"}]}, "role 'human'; allowed roles: system"),
    "images as a string": ({"messages": talk("<image>", "!"), "images": "wide.png"}, "images must be a list"),
    "content as a number": ({"messages": talk(3, "!")}, r"messages\[0\].content must be"),
    "loss of a question": ({"messages": [{"role": "user", "content": "?", "loss": True}]}, "is ignored"),
    "a list": ([1, 2], "must be a JSON object"),
    "box outside": ({"text": "<image><box>", "images": ["wide.png"], "boxes": [[0, 0, 301, 40]]}, "is outside of"),
    "box of no picture": ({"text": "<box>", "boxes": [[0, 0]]}, "belongs to picture 0, but the sample has 0"),
    "box backwards": (
        {"text": "<image><box>", "images": ["wide.png"], "boxes": [[9, 0, 3, 4]]},
        "right or bottom side before",
    ),
    "box of three": ({"text": "<image><box>", "images": ["wide.png"], "boxes": [[9, 0, 3]]}, "2 or 4 numbers"),
    "boxes without places": (
        {"text": "<image>", "images": ["wide.png"], "boxes": [[9, 0]]},
        "contains 0 <box>, but",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_sample_and_cause(renderer, media, name):
    record, message = BROKEN[name]
    for kind in ("jpg", "png"):
        whole = (media.base / ("large.jpg" if kind == "jpg" else "grey.png")).read_bytes()
        (media.base / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (2, 900)).save(media.base / "line.png")
    with pytest.raises(UserError, match=message) as error:
        renderer.encode(record, media.find, "data.jsonl:7", kind="tune")
    assert str(error.value).startswith("data.jsonl:7: ")


def test_folder_without_processor(tmp_path, make_renderer, model_folder):
    with pytest.raises(UserError, match="none does not exist"):
        Renderer(tmp_path / "none", DataSettings())
    with pytest.raises(UserError, match="processor cannot be loaded"):
        Renderer(tmp_path, DataSettings())
    for file in model_folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        Renderer(tmp_path, DataSettings())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json.*num_position_embeddings cannot be read"):
        Renderer(tmp_path, DataSettings())
    with pytest.raises(UserError, match=r"data\.min_pixels"):
        make_renderer(min_pixels=2**30)


@pytest.mark.parametrize(
    ("file", "place", "name"),
    [
        ("config.json", ["image_token_id"], "image_token_id"),
        ("config.json", ["vision_end_token_id"], "vision_end_token_id"),
        ("config.json", ["vision_config", "spatial_merge_size"], "spatial_merge_size"),
        ("processor_config.json", ["image_processor", "patch_size"], "patch_size"),
        ("processor_config.json", ["video_processor", "temporal_patch_size"], "temporal_patch_size"),
    ],
)
def test_a_processor_of_another_model_is_told(model_folder, tmp_path, file, place, name):
    """Pictures would stand at tokens, or be cut into patches, that the model does not expect."""
    for other in model_folder.iterdir():
        (tmp_path / other.name).symlink_to(other)
    content = json.loads((tmp_path / file).read_text())
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] += 1
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name} is \d+ in config\.json, but the processor's files have \d+"):
        Renderer(tmp_path, DataSettings())
