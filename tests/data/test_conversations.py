"""Two hundred varied conversations against the Hugging Face processor called with the same messages.

What is to be learned is worked out here from the token ids and the messages alone.
"""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conversations import PER_THEME, THEMES, conversation, corpus
from hf_reference import THINKING, assert_equal, reference, written
from PIL import Image
from transformers import AutoProcessor

from megavlm.config.settings import DataSettings
from megavlm.data.processor import VisionProcessor
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.demo.model_folder import make_model_folder
from megavlm.media.files import in_folder

LIMITS = {"min_pixels": 48 * 48, "max_pixels": 640 * 640}
HEADER = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with the plain and the thinking template, by whether it thinks; a tokenizer that knows the texts."""
    root, folders = tmp_path_factory.mktemp("models"), {}
    for thinks in (False, True):
        folder = make_model_folder(root / f"{thinks}", corpus=corpus(), vocab_size=3000, **LIMITS)
        if thinks:
            (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
        folders[thinks] = folder
    return folders


@pytest.fixture(scope="module")
def renderers(folders):
    return {thinks: Renderer(folder, DataSettings(seq_length=32768)) for thinks, folder in folders.items()}


@pytest.fixture(scope="module")
def processors(folders):
    return {thinks: AutoProcessor.from_pretrained(folder) for thinks, folder in folders.items()}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """All of them by theme, with their files in one folder."""
    folder = tmp_path_factory.mktemp("conversations")
    return {theme: [conversation(theme, number, folder) for number in range(PER_THEME)] for theme in THEMES}


@pytest.fixture(scope="module", params=THEMES)
def cases(request, conversations):
    """The conversations of one theme."""
    return conversations[request.param]


@contextmanager
def named(case):
    """Failures inside say which conversation it is, and show it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in {case.name}: {json.dumps(case.record, ensure_ascii=False)}")
        raise


def encode(renderers, case, kind):
    record = json.loads(json.dumps(case.record))  # as from a line
    return renderers[case.thinks].encode(record, in_folder(case.folder), case.name, kind=kind)


@pytest.fixture(scope="module")
def tuned(renderers, cases):
    """Samples for tuning; which of their tokens are visual is known from the comparison with the processor."""
    samples = []
    for case in cases:
        with named(case):
            samples.append(encode(renderers, case, "tune"))
    return samples


def test_equals_the_processor(processors, cases, tuned):
    for case, sample in zip(cases, tuned, strict=True):
        with named(case):
            assert_equal(sample, reference(processors[case.thinks], case.record, case.folder))


def target_weights(tokenizer, ids: list[int], messages: list[dict], thinks: bool) -> list[float]:
    """Weight of each token as a target: an answer's from behind its header to its end token.

    A header is what begins with <|im_start|> and ends with the token that has the first line break. Headers that
    stand in a text are passed over. The line that opens the thought is a thinking model's prompt, never its answer.
    """
    owners = []  # weight of what follows each header
    for message in messages:
        if message["role"] == "assistant":
            owners.append(message.get("weight", 1.0) * message.get("loss", True))
        else:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            owners += [0.0] * sum(text.count(HEADER) for text in texts)
    start, end, think = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>"])

    def behind_line(place: int) -> int:
        """The first token behind the one that ends the line in which `place` stands."""
        while place < len(ids) and "\n" not in tokenizer.decode(ids[place]):
            place += 1
        return place + 1

    weights, owners = [0.0] * len(ids), iter(owners)
    for place in range(len(ids)):
        if ids[place] != start or not tokenizer.decode(ids[place : behind_line(place)]).startswith(HEADER):
            continue
        first = behind_line(place)
        weight = next(owners)
        if thinks and ids[first] == think:
            first = behind_line(first)
        if weight:
            last = ids.index(end, first)
            weights[first : last + 1] = [weight] * (last + 1 - first)
    assert next(owners, None) is None
    return weights


def assert_learned(sample, weights: torch.Tensor) -> None:
    """Labels and weights stand one place before the tokens they are of."""
    expected = torch.where(weights > 0, sample.input_ids, IGNORE)
    torch.testing.assert_close(sample.labels[:-1], expected[1:])
    torch.testing.assert_close(sample.loss_weights[:-1], weights[1:])
    assert sample.labels[-1] == IGNORE
    assert sample.loss_weights[-1] == 0


def test_tuning_targets_are_the_answers(processors, cases, tuned):
    for case, sample in zip(cases, tuned, strict=True):
        with named(case):
            tokenizer = processors[case.thinks].tokenizer
            weights = target_weights(tokenizer, sample.input_ids.tolist(), case.record["messages"], case.thinks)
            assert any(weights)
            assert_learned(sample, torch.tensor(weights))


def test_pretraining_targets_are_all_text(processors, renderers, cases, tuned, monkeypatch):
    # The pixels have been compared already: most of the time is theirs.
    blank = lambda vision, item, out=None: vision.no_pixels(math.prod(item.grid) * vision.images_in_frame(item)).zero_()
    monkeypatch.setattr(VisionProcessor, "pixel_rows", blank)
    for case, tune in zip(cases, tuned, strict=True):
        messages = [{k: v for k, v in m.items() if k not in ("loss", "weight")} for m in case.record["messages"]]
        with named(case):
            sample = encode(renderers, replace(case, record=case.record | {"messages": messages}), "pretrain")
            torch.testing.assert_close(sample.input_ids, tune.input_ids)
            is_target = torch.cat([torch.tensor([False]), sample.labels[:-1] != IGNORE])
            assert_learned(sample, is_target.float())
            whole = written(processors[case.thinks], {**case.record, "messages": messages})
            learned = processors[case.thinks].tokenizer.decode(sample.input_ids[is_target])
            assert learned == whole.removeprefix("<|im_start|>")


def test_they_are_varied(conversations, tmp_path):
    """Two hundred different ones, with all that they are to have, and the same at each run."""
    cases = [case for theme in conversations.values() for case in theme]
    assert len({json.dumps(case.record["messages"]) for case in cases}) == 200
    assert conversation("tools", 7, tmp_path).record == conversations["tools"][7].record

    kinds, sizes, turned = Counter(), [], set()
    for path in cases[0].folder.iterdir():
        kinds[path.suffix] += 1
        if path.suffix not in (".mp4", ".webm"):
            with Image.open(path) as picture:
                kinds[picture.format, picture.mode] += 1
                turned.add(picture.getexif().get(0x0112))
                sizes.append(picture.size)
    assert {".jpg", ".png", ".webp", ".gif", ".mp4", ".webm"} <= set(kinds)
    modes = {("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
             ("GIF", "P"), ("WEBP", "RGBA")}  # fmt: skip
    assert modes <= set(kinds)
    assert set(range(1, 9)) <= turned
    assert max(width for width, _ in sizes) == 4000
    assert max(max(size) / min(size) for size in sizes) > 190

    messages = [message for case in cases for message in case.record["messages"]]
    assert {m.get("weight") for m in messages} == {None, 0, 0.25, 0.1, 1, 3.5}
    assert {m.get("loss") for m in messages} == {None, True, False}
    assert any(m.get("tool_calls") and m["content"] for m in messages)
    assert any(m["content"] == "" for m in messages if m["role"] == "assistant")
    systems = [case.record["messages"][0] for case in cases]
    assert {m["role"] for m in systems} == {"system", "user", "assistant"}
    assert any(m["content"] == "" for m in systems if m["role"] == "system")
    assert {case.record["messages"][-1]["role"] for case in cases} == {"user", "assistant", "tool"}
    frames = [video for case in cases for video in case.record.get("videos", ()) if not isinstance(video, str)]
    assert {isinstance(video, dict) and "fps" in video for video in frames} == {True, False}
