"""Lines of data: words that look like marks, numbers and characters that nobody can use, values that are too long."""

import json
import math

import pytest
from hf_reference import talk

from megavlm.base.errors import UserError
from megavlm.commands.infer import _record
from megavlm.records.marks import without_marks
from megavlm.records.records import check_record, rename_media
from megavlm.records.remarks import LITERAL_MARK
from megavlm.sources.jsonl import JsonlFile


def text(renderer, draft):
    return renderer.tokenizer.decode(draft.token_ids)


@pytest.fixture
def document(renderer, media):
    """The draft of a document, and its text without the end token."""

    def document(content, **fields):
        draft = renderer.draft({"text": content, **fields}, media.find, "here:1", kind="pretrain")
        return draft, text(renderer, draft).removesuffix("<|endoftext|>")

    return document


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def test_a_document_about_html_is_kept_and_told(document):
    draft, written = document("HTML5 has <video> and <image>.")
    assert written == "HTML5 has <video> and <image>."
    assert draft.remarks == (LITERAL_MARK,)


def test_marks_of_one_kind_are_words_where_only_the_other_kind_is_listed(document):
    draft, written = document("A <video> tag: <image>", images=["wide.png"])
    assert written == f"A <video> tag: {PICTURE}"
    assert draft.remarks == (LITERAL_MARK,)


def test_words_are_written_with_a_backslash_or_in_a_part_of_text(document):
    for content in (
        r"\<image> is <image>",
        [{"type": "text", "text": "<image> is "}, {"type": "image"}],
    ):
        draft, written = document(content, images=["wide.png"])
        assert written == f"<image> is {PICTURE}"
        assert draft.remarks == ()
    _, written = document([{"type": "text", "text": "is "}, {"type": "image", "image": "wide.png"}])
    assert written == f"is {PICTURE}"
    _, written = document(r"\<box> at <box> <image>", images=["wide.png"], boxes=[[150, 20]])
    assert written == rf"<box> at [500, 500] {PICTURE}"
    assert document(r"no boxes: \<box>")[1] == r"no boxes: \<box>"


def test_words_in_a_conversation(renderer, media):
    record = {"messages": talk(r"<image> or \<image>?", r"\<video>"), "images": ["wide.png"]}
    draft = renderer.draft(record, media.find, "here:1", kind="tune")
    assert text(renderer, draft).endswith(
        f"user\n{PICTURE} or <image>?<|im_end|>\n<|im_start|>assistant\n<video><|im_end|>\n"
    )
    assert without_marks(record["messages"][0]["content"]) == " or <image>?"


def test_a_mark_without_a_file_says_how_to_write_the_word():
    for record, kind in (
        ({"messages": talk("What is <video>?", "A tag.")}, "tune"),
        ({"text": "What is <video>?", "videos": []}, "pretrain"),
    ):
        with pytest.raises(UserError, match="contains 1 <video>, but videos has 0 entries") as error:
            check_record(record, kind, "here:1")
        assert r'\<video> (in JSON "\\<video>")' in str(error.value)
        assert '{"type": "text", "text": "<video>"}' in str(error.value)


def test_a_question_on_the_terminal_may_contain_the_words(renderer, media):
    def question(prompt, images=(), videos=()):
        draft = renderer.draft(_record(prompt, images, videos), media.find, "--prompt", kind="prompt")
        return text(renderer, draft).split("user\n")[1].split("<|im_end|>")[0]

    assert question("What does <video> do, and <image>?") == "What does <video> do, and <image>?"
    assert question("What does <video> do here?", ["wide.png"]) == f"{PICTURE}What does <video> do here?"
    assert question(r"Is \<image> in <image>?", ["wide.png"]) == f"Is <image> in {PICTURE}?"
    assert question(r"Is \<image> in it?", ["wide.png"]) == f"{PICTURE}Is <image> in it?"
    with pytest.raises(UserError, match="--prompt: the text contains 2 <image>, but images has 1 entries"):
        question("<image> <image>", ["wide.png"])


def test_media_in_a_text_of_parts_are_renamed_for_shards():
    record = {"text": [{"type": "text", "text": "a.png"}, {"type": "image", "image": "a.png"}]}
    renamed = rename_media(record, lambda path: "0.png")
    assert renamed["text"] == [{"type": "text", "text": "a.png"}, {"type": "image", "image": "0.png"}]


def line(**changed):
    return {"messages": talk("?", "!"), **changed}


NOT_FINITE = {
    "weight": lambda bad: {"messages": [*talk("?"), {"role": "assistant", "content": "!", "weight": bad}]},
    "arguments of a tool": lambda bad: {
        "messages": [*talk("?"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [bad]}}]}]
    },
    "tools": lambda bad: line(tools=[{"name": "f", "least": bad}]),
    "fps": lambda bad: {"messages": talk("<video>", "!"), "videos": [{"frames": ["frame0.png"], "fps": bad}]},
    "fps of a part": lambda bad: {
        "messages": talk([{"type": "video", "video": ["frame0.png", "frame1.png"], "fps": bad}], "!")
    },
    "box": lambda bad: {"text": "<image><box>", "images": ["wide.png"], "boxes": [[bad, 1]]},
}


@pytest.mark.parametrize("place", NOT_FINITE)
@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_are_infinite_or_nan_are_refused_at_the_line(renderer, media, place, bad):
    written = json.dumps(NOT_FINITE[place](math.pi)).replace(str(math.pi), bad)
    with pytest.raises(UserError, match=r"here:1: .* must be a number") as error:
        renderer.draft(json.loads(written), media.find, "here:1", kind="tune")
    assert len(error.value.message) < 300


@pytest.mark.parametrize("weight", [1e39, 10**40])
def test_a_weight_that_is_infinite_in_float32_is_refused(renderer, media, weight):
    with pytest.raises(UserError, match=r"here:1: messages\[1\]: weight must be a number"):
        renderer.draft(NOT_FINITE["weight"](weight), media.find, "here:1", kind="tune")


HALVES = [
    line(messages=talk("?", "Nice \ud83d")),
    line(messages=talk([{"type": "text", "text": "Nice \ude00"}], "!")),
    {"text": "Nice \ud83d"},
    {"text": "<image>", "images": ["\ud83d.png"]},
    line(tools=[{"\ud83d": 1}]),
]


@pytest.mark.parametrize("record", HALVES)
@pytest.mark.parametrize("kind", ["tune", "pretrain", "prompt"])
def test_half_a_character_is_named_in_words(renderer, media, record, kind):
    with pytest.raises(UserError, match=r"here:1: .*half of a character") as error:
        renderer.draft(record, media.find, "here:1", kind=kind)
    str(error.value).encode()  # can be printed and written to a file


def test_half_a_character_in_a_field_that_nobody_reads_does_no_harm(renderer, media):
    renderer.draft(line(note="\ud83d", score=math.nan), media.find, "here:1", kind="tune")


def test_a_picture_in_base64_is_not_printed(renderer, media, tmp_path):
    data = "iVBORw0KGgo" * 100_000
    for record in (
        {"text": "<image>", "images": [data]},
        {"text": "<image>", "images": [{"bytes": data}]},
        {"text": "<video>", "videos": [[data, data]]},
        {"text": [{"type": "picture", "data": data}]},
        {"text": "x", data: 1, "message": 2},
        {data: "x"},
        {"messages": [{"role": data, "content": "x"}]},
        {"messages": [{"from": data}]},
        line(tools=data),
        {"text": "<image><box>", "images": ["wide.png"], "boxes": [data]},
    ):
        with pytest.raises(UserError) as error:
            renderer.draft(record, media.find, "here:1", kind="tune")
        assert len(str(error.value)) < 700
        assert "\n" not in error.value.message


def test_endless_nesting_is_named(tmp_path, renderer):
    deep = "[" * 200 + "]" * 200
    (tmp_path / "deep.jsonl").write_text(f'{{"text": {deep}}}\n{{"text": {"[" * 100_000}}}\n')
    file = JsonlFile(tmp_path / "deep.jsonl")
    with pytest.raises(UserError, match=r"deep\.jsonl:1: text.* more than 64 deep"):
        check_record(file.read(0)[0], "tune", file.source(0))
    with pytest.raises(UserError, match=r"deep\.jsonl:2: .*nested too deeply"):
        file.read(1)


@pytest.mark.parametrize(
    ("field", "value"), [("answer", "half \ud83d"), ("answer", float("nan")), ("problem", "half \ud83d")]
)
def test_a_question_and_its_answer_have_values_that_can_be_used(field, value):
    with pytest.raises(UserError, match=rf"here:1: {field} (contains|must)"):
        check_record({"problem": "2 + 2", "answer": 4} | {field: value}, "tune", "here:1")
