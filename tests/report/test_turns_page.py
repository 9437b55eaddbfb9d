"""Conversations with an environment in the report, rollouts.jsonl and the table of W&B."""

import base64
import io
import json

import pytest
from PIL import Image

from megavlm.monitor import rollout_log
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, LoggedTurn, RolloutLog, read_rollouts
from megavlm.monitor.rollout_table import _told
from megavlm.report.page import render_page
from megavlm.report.rollouts import ShownGroup, ShownStep, marked_tokens


def png(size=(200, 100)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(file, "PNG")
    return file.getvalue()


def answer(*turns: LoggedTurn) -> LoggedAnswer:
    return LoggedAnswer("7<|im_end|>", 1.0, {"environment": 1.0}, 0.5, 4, "stop", [], turns)


@pytest.fixture
def logged(tmp_path):
    turns = [
        LoggedTurn("model", "Open.<|im_end|>"),
        LoggedTurn("environment", "Which <b>digit</b>?", [png(), b"broken", png()]),
        LoggedTurn("model", "7<|im_end|>"),
    ]
    many = [LoggedTurn("model", "x" * 3000)] * (rollout_log.MAX_TURNS + 3)
    RolloutLog(tmp_path).write(1, [LoggedGroup("a.jsonl:1", "Which?", [], "7", [answer(*turns), answer(*many)])])
    return tmp_path


def test_turns_are_small_in_the_file_and_read_again(logged):
    [step] = read_rollouts(logged)
    first, second = step.groups[0].answers
    assert [turn.by for turn in first.turns] == ["model", "environment", "model"]
    said = first.turns[1]
    assert (len(said.pictures), said.pictures_left_out) == (1, 2)  # one is broken, and one too many
    with Image.open(io.BytesIO(base64.b64decode(said.pictures[0].partition(",")[2]))) as picture:
        assert picture.size == (64, 32)
        assert all(abs(a - b) < 6 for a, b in zip(picture.getpixel((9, 9)), (10, 200, 30), strict=True))  # a JPEG
    assert len(second.turns) == rollout_log.MAX_TURNS
    assert max(len(turn.text) for turn in second.turns) <= rollout_log.MAX_TURN_TEXT
    assert _told(first).splitlines()[1] == "[environment, 3 pictures] Which <b>digit</b>?"
    assert _told(LoggedAnswer("7", 1.0, {}, 0.5, 4, "stop")) == "7"


def test_lines_of_earlier_versions_are_read(tmp_path):
    RolloutLog(tmp_path).write(1, [LoggedGroup("a.jsonl:1", "Which?", [], "7", [answer()])])
    file = tmp_path / rollout_log.FILE_NAME
    line = json.loads(file.read_text())
    del line["groups"][0]["answers"][0]["turns"]
    file.write_text(json.dumps(line) + "\n")
    assert list(read_rollouts(tmp_path)[0].groups[0].answers[0].turns) == []


def test_the_page_tells_the_environment_apart(logged):
    [step] = read_rollouts(logged)
    group = step.groups[0]
    shown = ShownStep(1, [ShownGroup(group, list(group.answers), [], [])])
    filters, texts = (
        {"marked_tokens": marked_tokens},
        {"shown_title": "Sampled answers", "shown_note": "", "shown_value": "reward"},
    )
    page = render_page("rollouts.html.jinja", filters=filters, shown_steps=[shown], **texts)
    assert page.count('class="turn environment"') == 1
    assert page.count('class="turn model"') == 2 + rollout_log.MAX_TURNS
    assert "Which &lt;b&gt;digit&lt;/b&gt;?" in page
    assert 'src="data:image/jpeg;base64,' in page
    assert "not shown: 2 more pictures" in page
