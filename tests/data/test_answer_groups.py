"""Pairs and judged answers: what they may look like, and what is refused."""

import pytest

from megavlm.base.errors import UserError
from megavlm.data.answer_groups import draft_unit
from megavlm.data.row import IGNORE, Annotations
from megavlm.records.records import rename_media
from megavlm.records.remarks import REPEATED_PROMPT
from megavlm.records.skipped_samples import UnfitSample
from megavlm.sources.jsonl import JsonlFile

PAIR = {"prompt": "<image>What is this?", "chosen": "A woman.", "rejected": "A dog, perhaps.", "images": ["large.jpg"]}
JUDGED = {"prompt": "<image>What is this?", "completion": "A woman.", "label": True, "images": ["large.jpg"]}


@pytest.fixture
def unit(media, renderer):
    """The draft of the first of some records."""
    import json

    def unit(kind, *records):
        path = media.base / "units.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return draft_unit(renderer, JsonlFile(path), 0, kind)

    return unit


def learned(renderer, sample):
    return renderer.tokenizer.decode(sample.labels[sample.labels != IGNORE])


def test_forms_of_a_pair(unit, renderer):
    """A prompt as text or messages, answers as text, message or messages: all the same pair."""
    question = [{"role": "user", "content": PAIR["prompt"]}]
    forms = [
        PAIR,
        {**{name: value for name, value in PAIR.items() if name != "prompt"}, "messages": question},
        {**PAIR, "chosen": {"role": "assistant", "content": "A woman."}},
        {**PAIR, "rejected": [{"role": "assistant", "content": "A dog, perhaps."}], "note": "mine"},
    ]
    for form in forms:
        draft = unit("pair", form)
        row = renderer.complete_row([draft])
        assert (row.num_samples, row.num_images) == (2, 1)
        first, second = (renderer.complete(d) for d in (draft, *draft.followers))
        assert learned(renderer, first) == "A woman.<|im_end|>"
        assert learned(renderer, second) == "A dog, perhaps.<|im_end|>"
        assert draft.annotations == Annotations(side="chosen", margin=0.0)
        assert draft.padded_length(1) == len(first.input_ids) + len(second.input_ids)
    talk = [*question, {"role": "assistant", "content": "A woman."}, {"role": "user", "content": "Where?"}]
    record = {"messages": talk, "chosen": "In space.", "rejected": "At home.", "images": ["large.jpg"], "margin": 2}
    draft = unit("pair", record)
    assert learned(renderer, renderer.complete(draft)) == "In space.<|im_end|>"  # the last answer alone
    assert draft.annotations == Annotations(side="chosen", margin=2.0)


def say(role, content):
    return {"role": role, "content": content}


LONG = "What do you see in this picture, and why? <image>"  # a text that an answer does not begin with by chance
REPEATING = {
    "trl: whole conversations": {"chosen": [say("user", "Q"), say("assistant", "A")],
                                 "rejected": [say("user", "Q"), say("assistant", "B")]},
    "ultrafeedback: a text beside them": {"prompt": "Q", "chosen": [say("user", "Q"), say("assistant", "A")],
                                          "rejected": [say("user", "Q "), say("assistant", "B")]},
    "messages beside them": {"messages": [say("user", "Q")], "chosen": [say("user", "Q"), say("assistant", "A")],
                             "rejected": [say("user", "Q"), say("assistant", "B")]},
    "parts beside them": {"prompt": [say("user", [{"type": "text", "text": "Q"}])],
                          "chosen": [say("user", "Q"), say("assistant", "A")], "rejected": "B"},
    "a text in texts": {"prompt": LONG, "chosen": f"{LONG}\nA", "rejected": f"{LONG} B", "images": ["wide.png"]},
}  # fmt: skip


@pytest.mark.parametrize("form", REPEATING)
def test_a_prompt_in_the_answers_is_not_trained_and_told(unit, renderer, form):
    record = REPEATING[form]
    draft = unit("pair", record)
    question = LONG.replace("<image>", "") if "images" in record else "Q"
    for answer, sample in zip("AB", (draft, *draft.followers), strict=True):
        sample = renderer.complete(sample)
        assert learned(renderer, sample) == f"{answer}<|im_end|>"
        assert renderer.tokenizer.decode(sample.input_ids).count(question) == 1
    assert draft.remarks == (REPEATED_PROMPT,)
    assert unit("pair", PAIR).remarks == ()


def test_a_system_message_and_earlier_turns_in_the_answers(unit, renderer):
    earlier = [say("system", "S"), say("user", "Q"), say("assistant", "E"), say("user", "R")]
    for record in (
        {"chosen": [*earlier, say("assistant", "A")], "rejected": [*earlier, say("assistant", "B")]},
        {
            "prompt": earlier[1:],
            "chosen": [*earlier, say("assistant", "A")],
            "rejected": [*earlier, say("assistant", "B")],
        },
    ):
        draft = unit("pair", record)
        for answer, sample in zip("AB", (draft, *draft.followers), strict=True):
            assert learned(renderer, renderer.complete(sample)) == f"{answer}<|im_end|>"
            assert renderer.tokenizer.decode(sample.token_ids).count("<|im_start|>") == 5


def test_an_answer_may_begin_with_the_words_of_a_short_prompt(unit, renderer):
    draft = unit("pair", {"prompt": "Hello", "chosen": "Hello there!", "rejected": "Hello."})
    assert learned(renderer, renderer.complete(draft)) == "Hello there!<|im_end|>"
    assert draft.remarks == ()


def test_a_short_question_is_repeated_if_each_of_several_answers_begins_with_it(unit, renderer):
    draft = unit("pair", {"prompt": "Why?", "chosen": "Why? Because.", "rejected": "Why? No idea."})
    assert learned(renderer, renderer.complete(draft)) == "Because.<|im_end|>"
    assert draft.remarks == (REPEATED_PROMPT,)
    draft = unit("pair", {"prompt": "Why?", "chosen": "Why? Because.", "rejected": "No idea."})
    assert learned(renderer, renderer.complete(draft)) == "Why? Because.<|im_end|>"
    assert draft.remarks == ()


def test_a_judged_conversation(unit, renderer):
    first, second = [say("user", "Q"), say("assistant", "A")], [say("user", "R"), say("assistant", "B")]
    for prompts in ({}, {}), ({"prompt": "Q"}, {"prompt": "R"}):
        records = (
            {"completion": first, "label": True, **prompts[0]},
            {"completion": second, "label": True, **prompts[1]},
        )
        draft = unit("judged", *records)
        assert learned(renderer, renderer.complete(draft)) == "A<|im_end|>"
        (follower,) = draft.followers
        assert learned(renderer, renderer.complete(follower)) == "B<|im_end|>"
        assert renderer.tokenizer.decode(follower.token_ids).count("R") == 0
        assert draft.remarks == (REPEATED_PROMPT,)


def test_judged_answers_are_followed_by_the_next_ones(unit, renderer):
    other = {"prompt": "And this?", "completion": "A rocket.", "label": False}
    draft = unit("judged", JUDGED, other)
    assert draft.annotations == Annotations(desirable=True)
    (follower,) = draft.followers
    assert learned(renderer, renderer.complete(follower)) == "A rocket.<|im_end|>"
    assert follower.shares_media
    boxed = {**JUDGED, "completion": "At <box>.", "boxes": [[0, 0, 9, 9]]}
    for first, second in (
        (JUDGED, {**other, "completion": "A woman."}),
        (JUDGED, {"text": "no answer"}),
        (JUDGED, "no object"),
        (JUDGED, {**other, "completion": "word " * 4000}),
        (JUDGED, {**other, "completion": "<image>"}),
        (boxed, other),
    ):
        draft = unit("judged", first, second)
        assert not draft.followers  # and the sample itself is none the worse
        assert draft.annotations == Annotations(desirable=True)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("pair", {"margin": "large"}, "margin must be a number, found 'large'"),
        ("pair", {"margin": float("nan")}, "margin must be a number"),
        ("pair", {"chosen": ""}, "chosen is empty"),
        ("pair", {"rejected": None}, "rejected must be a string"),
        ("pair", {"chosen": PAIR["rejected"]}, "chosen and rejected are equal"),
        ("pair", {"margin": 1e39}, "margin must be a number"),
        ("pair", {"margin": float("inf")}, "margin must be a number"),
        ("pair", {"chosen": [say("user", "Else?"), say("assistant", "A")]}, "begins with a user message that is not"),
        ("pair", {"messages": []}, "either prompt or messages; this one has both"),
        ("pair", {"prompt": []}, "the prompt must be a string or a list"),
        ("pair", {"prompt": [{"role": "assistant", "content": "!"}]}, "ends with an assistant message"),
        ("pair", {"images": []}, "contains 1 <image>, but images has 0 entries"),
        ("pair", {"chosen": "<image>", "images": ["large.jpg"] * 2}, r"1 <\|image_pad\|> for 2 files"),
        ("judged", {"label": "yes"}, "label must be true .* found 'yes'"),
        ("judged", {"label": None}, "label must be true"),
        ("judged", {"completion": {}}, "completion is empty"),
    ],
)
def test_what_is_refused(unit, kind, changed, message):
    with pytest.raises(UserError, match=rf"units\.jsonl:1: .*{message}"):
        unit(kind, {"pair": PAIR, "judged": JUDGED}[kind] | changed)


def test_pairs_longer_than_a_row(unit):
    """Each answer would fit by itself."""
    with pytest.raises(UnfitSample, match=r"has \d+ tokens"):
        unit("pair", {**PAIR, "chosen": "word " * 1800, "rejected": "words " * 1800})


def test_media_of_prompts_are_renamed_for_shards():
    picture = {"type": "image", "image": "a.jpg"}
    record = {"prompt": [{"role": "user", "content": [picture]}], "chosen": "A.", "rejected": [{"content": [picture]}]}
    seen = []
    renamed = rename_media(record, lambda path: seen.append(path) or "0.jpg")
    assert seen == ["a.jpg"] * 2
    assert renamed["prompt"][0]["content"] == renamed["rejected"][0]["content"] == [{"type": "image", "image": "0.jpg"}]
    assert renamed["chosen"] == "A."
