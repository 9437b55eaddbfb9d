"""The demo's data: every record is well formed, every picture is there, and the held-out digits stay held out."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megavlm.base.errors import UserError
from megavlm.demo.data import (
    HELDOUT_FILE,
    NUM_HELDOUT,
    TRAIN_FILES,
    VIEWS_PER_DIGIT,
    read_records,
    read_texts,
    write_data,
    write_records,
)
from megavlm.demo.photographs import PHOTOGRAPHS


def records(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def picture_hash(path) -> str:
    return hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()


@pytest.mark.parametrize("name", [*TRAIN_FILES, HELDOUT_FILE])
def test_records_are_well_formed(demo_data, name):
    lines = records(demo_data, name)
    assert lines
    for record in lines:
        if "messages" in record:
            user, assistant = record["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert assistant["content"] in set("0123456789")
            text = user["content"]
        else:
            text = record["text"]
            assert text.replace("<image>", "").strip()
        assert text.count("<image>") == len(record.get("images", []))
        assert all((demo_data / path).is_file() for path in record.get("images", []))


def test_records_are_read_as_they_were_written(tmp_path):
    records = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    write_records(tmp_path / "a.jsonl", records)
    assert read_records(tmp_path / "a.jsonl") == records


def test_heldout_digits_are_in_no_training_file(demo_data):
    heldout = {picture_hash(demo_data / path) for r in records(demo_data, HELDOUT_FILE) for path in r["images"]}
    paths = {path for name in TRAIN_FILES for record in records(demo_data, name) for path in record.get("images", [])}
    train = {picture_hash(demo_data / path) for path in paths}
    assert len(heldout) == NUM_HELDOUT
    assert not heldout & train
    # Not as a moved view either: the number of the digit is in the file's name.
    numbers = {record["images"][0].split("_")[0] for record in records(demo_data, HELDOUT_FILE)}
    assert not {path.split("_")[0] for path in paths if path.startswith("digits/")} & numbers
    assert len(paths) == (1797 - NUM_HELDOUT) * VIEWS_PER_DIGIT + len(PHOTOGRAPHS)


def test_answers_are_the_data_set_s_labels(demo_data):
    targets = load_digits().target
    asked = records(demo_data, "questions") + records(demo_data, HELDOUT_FILE)
    for record in asked:
        number = int(record["images"][0].removeprefix("digits/").split("_")[0])
        assert record["messages"][1]["content"] == str(targets[number])
    for record in records(demo_data, "digit_captions"):
        number = int(record["images"][0].removeprefix("digits/").split("_")[0])
        assert str(targets[number]) in record["text"]
    counts = Counter(record["messages"][1]["content"] for record in records(demo_data, HELDOUT_FILE))
    assert len(counts) == 10
    assert min(counts.values()) > 20  # so that one answer for all is about chance


def test_digit_views_are_the_same_digit_moved(demo_data):
    levels = load_digits().images[0]
    first = np.asarray(Image.open(demo_data / "digits/0000_0.png"), dtype=float)
    assert first.shape == (32, 32)
    # The middles of the 4 x 4 blocks are near the original's levels.
    blocks = first.reshape(8, 4, 8, 4)[:, 1:3, :, 1:3].mean((1, 3))
    assert np.corrcoef(blocks.ravel(), levels.ravel())[0, 1] > 0.97
    for view in range(1, VIEWS_PER_DIGIT):
        moved = np.asarray(Image.open(demo_data / f"digits/0000_{view}.png"), dtype=float)
        assert 0.5 < np.corrcoef(first.ravel(), moved.ravel())[0, 1] < 0.999


def test_photographs_are_small_and_captioned(demo_data):
    captions = records(demo_data, "photograph_captions")
    assert {record["images"][0] for record in captions} == {
        f"photographs/{path.name}" for path in (demo_data / "photographs").iterdir()
    }
    for path in (demo_data / "photographs").iterdir():
        picture = Image.open(path)
        assert picture.mode == "RGB"
        assert max(picture.size) <= 128
        assert np.asarray(picture).std() > 5  # not blank


def test_same_seed_same_bytes(demo_data, tmp_path):
    again = write_data(tmp_path / "again")
    files = sorted(path.relative_to(demo_data) for path in demo_data.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((demo_data / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_data(tmp_path / "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_texts_for_the_tokenizer_have_no_picture_marks(demo_data):
    texts = read_texts(demo_data)
    assert not any("<image>" in text for text in texts)
    assert "Which digit is this?" in texts
