"""Two thousand damaged lines: each is a row, or a skipped sample with a message that names the line in a few words."""

import json
import math
import random
from collections import Counter
from functools import partial

import pytest

from megavlm.base.errors import UserError
from megavlm.data.answer_groups import draft_unit
from megavlm.data.draft import DraftError
from megavlm.data.row import Row
from megavlm.records.skipped_samples import BROKEN, NO_TARGET, TOO_LONG, SkippedSample
from megavlm.sources.open_files import Converted

COUNT = 2000


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "id": "1", "function": {"name": "zoom", "arguments": {"box": [1, 2], "note": 'a "b"'}}}
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "properties": {}}}}]
PARTS = [{"type": "text", "text": "<image> is "}, {"type": "image", "image": "tiny.webp"}, {"type": "image"}]
CLIP = {"frames": ["frame0.png", "frame1.png"], "fps": 2}
TUNE = [
    {"messages": [say("system", ""), say("user", "<image>What?"), say("assistant", "A.", weight=0.5)],
     "images": ["wide.png"]},
    {"messages": [say("user", PARTS), say("assistant", "<think>\nHm.</think>B", loss=True)], "images": ["wide.png"]},
    {"messages": [say("user", "Look: <video>"), say("assistant", None, tool_calls=[CALL]),
                  say("tool", "24", name="zoom"), say("assistant", "24")], "tools": TOOLS, "videos": [CLIP]},
    {"messages": [say("user", "<image>Where?"), say("assistant", "At <box>.")], "images": ["wide.png"],
     "boxes": [[1, 2, 30, 40]]},
]  # fmt: skip
VALID = {
    "tune": TUNE,
    "pretrain": [
        {"text": "A <image> and <box>", "images": ["wide.png"], "boxes": [{"box": [3, 4], "image": 0}]},
        {"text": [{"type": "text", "text": "A "}, {"type": "video", "video": ["frame0.png", "frame1.png"], "fps": 4}]},
        {"messages": [say("user", "Hi"), say("assistant", "Ho")]},
    ],
    "prompt": TUNE,
    "pair": [
        {"prompt": "<image>What?", "chosen": "A.", "rejected": "B.", "margin": 0.5, "images": ["wide.png"]},
        {"chosen": [say("user", "Q"), say("assistant", "A")], "rejected": [say("user", "Q"), say("assistant", "B")]},
        {"messages": [say("user", "Q"), say("assistant", "A"), say("user", PARTS[:2])], "chosen": say("assistant", "A"),
         "rejected": [say("assistant", "B")]},
    ],
    "judged": [
        {"prompt": [say("user", "Q")], "completion": "A", "label": True},
        {"prompt": "Q", "completion": [say("user", "Q"), say("assistant", "A")], "label": False},
    ],
}  # fmt: skip
# Forms of public data sets; the kind is what they are converted to.
FOREIGN = {
    "tune": [
        {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
         "image": "wide.png", "system": "Be brief."},
        {"question": "What?", "answers": ["A.", "B."], "image": "wide.png"},
        {"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1, "image_1": "wide.png"},
    ],
    "pair": [
        {"question": "What?", "chosen": "A.", "rejected": "B.", "image": "wide.png"},
        {"image": "wide.png", "text": '{"question": "What?", "chosen": "A.", "rejected": "B."}'},
    ],
    "pretrain": [{"caption": "A cat.", "image": "wide.png"}, {"text": "A cat.", "image": {"path": "wide.png"}}],
}  # fmt: skip


def nested(depth):
    value = "deep"
    for number in range(depth):
        value = [value] if number % 2 else {"content": value}
    return value


JUNK = [
    *(None, True, False, 0, -1, 7, 0.5, 1e30, 1e39, 1e-320, math.nan, math.inf, -math.inf, 10**400),
    *("", " ", "x", "word " * 2000, "iVBORw0KGgo" * 400),
    *("\ud83d", "a\x00b\x1b[1m\n", "👩‍👩‍👧 图片 \u202e\u2028", "null"),
    *("<image>", "<video>" * 3, r"\<image>", "<box>", "<|image_pad|>", "<|im_end|>\n<|im_start|>assistant\n"),
    *("wide.png", "frame0.png", "no.png", ".", "/", "http://[", "user", "assistant", "tool", "text", "image"),
    *([], {}, [[]], [None], ["x"] * 50, {"type": "text", "text": 3}, {"type": "image", "image": ["a"]}, {"a": {}}),
    *(PARTS, CLIP, say("assistant", "A"), [say("user", "Q")], nested(12), nested(300)),
]  # fmt: skip
NAMES = [
    *("messages", "text", "images", "image", "videos", "boxes", "tools", "prompt", "chosen", "label", "margin", "role"),
    *("content", "weight", "loss", "tool_calls", "reasoning_content", "type", "fps", "note", "k" * 3000, "\ud83d", ""),
]  # fmt: skip


def damaged(draw, value):
    """A copy of a value with one change somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        value, name = dict(value), draw.choice(list(value))
        change = draw.random()
        if change < 0.12:
            del value[name]
        elif change < 0.2:
            value[draw.choice(NAMES)] = value.pop(name)
        elif change < 0.32:
            value[draw.choice(NAMES)] = draw.choice(JUNK)
        else:
            value[name] = damaged(draw, value[name])
        return value
    if isinstance(value, list) and value and draw.random() < 0.8:
        value, place = list(value), draw.randrange(len(value))
        change = draw.random()
        if change < 0.1:
            del value[place]
        elif change < 0.2:
            value.insert(place, draw.choice([value[place], draw.choice(JUNK)]))
        elif change < 0.3:
            draw.shuffle(value)
        else:
            value[place] = damaged(draw, value[place])
        return value
    if isinstance(value, str) and draw.random() < 0.3:
        place, junk = draw.randrange(len(value) + 1), str(draw.choice(JUNK))
        return value[:place] + junk + value[place:]
    return draw.choice([[value], {"value": value}]) if draw.random() < 0.1 else draw.choice(JUNK)


class Lines:
    """A file of these records, as they are after they were written and read."""

    path = "fuzz.jsonl"

    def __init__(self, records, find):
        self.lines, self.find = [json.dumps(record) for record in records], find

    def __len__(self):
        return len(self.lines)

    def source(self, index):
        return f"{self.path}:{index + 1}"

    def read(self, index):
        return json.loads(self.lines[index]), self.find


@pytest.fixture(scope="module")
def read(renderer, media):
    """The row of the first of some records."""

    def read(kind, *records):
        file = Converted(Lines(records, media.find), {}, None)
        return renderer.complete_row([draft_unit(renderer, file, 0, kind)])

    return read


def ending(read, *arguments):
    """The row, or the exception."""
    try:
        return read(*arguments)
    except DraftError as error:
        return error.__cause__
    except Exception as error:
        return error


def test_the_lines_are_valid_before(read):
    for forms in (VALID, FOREIGN):
        for kind, records in forms.items():
            for record in records:
                assert isinstance(read(kind, record), Row)


@pytest.mark.parametrize(("forms", "count"), [(VALID, COUNT), (FOREIGN, COUNT // 2)], ids=["own", "foreign"])
def test_a_damaged_line_is_a_row_or_a_skipped_sample(read, forms, count):
    found = Counter()
    for number in range(count):
        draw = random.Random(number)
        kind = list(forms)[number % len(forms)]
        record = draw.choice(forms[kind])
        for _ in range(draw.choice((1, 1, 2, 4))):
            record = damaged(draw, record)
        tell = partial("{}: {} {}".format, number, kind)
        outcome = ending(read, kind, record, draw.choice(forms[kind]))
        found[kind, type(outcome) is Row] += 1
        if isinstance(outcome, UserError):
            assert outcome.message.startswith("fuzz.jsonl:1: "), tell(outcome)
            assert len(outcome.message) <= 500, tell(len(outcome.message))
            assert outcome.message.isprintable(), tell(repr(outcome))
            assert SkippedSample.of(0, "fuzz.jsonl:1", outcome).kind in (BROKEN, TOO_LONG, NO_TARGET), tell(outcome)
        else:
            assert isinstance(outcome, Row), tell(f"{outcome!r:.300}")
            assert math.isfinite(outcome.loss_weights.sum()), tell("weights")
            assert outcome.input_ids.numel() == outcome.position_ids.shape[-1], tell("positions")
    assert min(found.values()) >= 30, found
    assert len(found) == 2 * len(forms)
