"""`megavlm data inspect --duplicates`: what is there twice is found, also in parts and by several processes."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from toy import write_records

from megavlm.base.errors import UserError
from megavlm.commands import data_inspect
from megavlm.config.settings import Settings
from megavlm.duplicates import scan as scanning
from megavlm.duplicates.groups import NEAR, Group, groups_of
from megavlm.duplicates.signatures import NUM_HASHES, look_of, min_hashes, words_of
from megavlm.media.files import File
from megavlm.sources.open_files import open_file

SONG = "the cat sat on the mat and looked at the moon while all the dogs of the town were barking at a passing train"


def talk(question, answer, *images):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **({"images": list(images)} if images else {}),
    }


@pytest.fixture
def settings(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("MEGAVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scanning, "_BLOCK", 2)
    cat = Image.fromarray(photographs.chelsea())
    cat.save(tmp_path / "cat.png")
    cat.save(tmp_path / "copy.png")
    cat.resize((200, 133)).save(tmp_path / "small.jpg", quality=60)
    Image.fromarray(photographs.coffee()).save(tmp_path / "cup.png")
    first = [
        talk("<image>What is it?", "A cat.", "cat.png"),  # 1
        talk("Sing.", SONG),
        talk("<image>What is it?", "A cup.", "cup.png"),
        talk("<image>What is it?", "A cat.", "copy.png"),  # 1 again, by another name
        talk("<image>Describe it!", "Whiskers.", "small.jpg"),  # the picture of 1, smaller
        talk("<image>Describe it!", "Whiskers.", "none.png"),
    ]
    second = [talk("Sing!", SONG.replace("moon", "sun")), talk("Two?", "Two.")]
    held_out = [talk("two", "TWO"), talk("Three?", "Three.")]
    for name, records in (("a", first), ("b", second), ("held", held_out)):
        write_records(tmp_path / f"{name}.jsonl", records)
    train = [{"path": tmp_path / "a.jsonl"}, {"path": tmp_path / "b.jsonl"}]
    data = {"train": train, "eval": tmp_path / "held.jsonl", "seq_length": 512}
    return Settings(model={"hf": model_folder}, data=data)


def test_duplicates(settings, tmp_path, capsys, monkeypatch):
    for part in ("1/2", "2/2"):
        assert data_inspect.main(settings, tmp_path / "none", duplicates=True, workers=2, part=part) == 0
    assert not (tmp_path / "none").exists()
    with monkeypatch.context() as patch:  # all was read
        patch.setattr(scanning, "_signatures", lambda *arguments: pytest.fail("a block is read again"))
        assert data_inspect.main(settings, tmp_path / "out", duplicates=True, workers=1) == 0
    found = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    place = lambda file, line: f"{tmp_path}/{file}.jsonl:{line}"
    expected = [
        ("same sample", [place("a", 1), place("a", 4)], False),
        ("same sample", [place("b", 2), place("held", 1)], True),
        ("nearly the same sample", [place("a", 2), place("b", 1)], False),
        ("nearly the same picture", [place("a", 1), place("a", 5)], False),
    ]
    assert [(line["kind"], line["samples"], line["held_out"]) for line in found] == expected
    printed = " ".join(capsys.readouterr().out.split())
    assert "duplicates among 10 samples" in printed
    assert "1 sample could not be read" in printed
    assert "same sample: 2 groups, 2 more than one of each" in printed
    assert "4 pictures and videos are named, of 3 different files" in printed
    assert "1 group with samples of data.eval and of data.train" in printed
    assert f"all of them: {tmp_path / 'out' / 'duplicates.jsonl'}" in printed
    write_records(tmp_path / "b.jsonl", [talk("Sing!", "La."), talk("Two?", "Two.")])  # is read again
    assert data_inspect.main(settings, tmp_path / "again", duplicates=True, workers=1) == 0
    again = (tmp_path / "again" / "duplicates.jsonl").read_text()
    assert "nearly the same sample" not in again
    assert "same sample" in again


@pytest.mark.usefixtures("settings")  # its pictures and its cache
def test_like_texts_belong_together_if_their_pictures_are_alike_too(tmp_path):
    """Also where many samples have the same words, and where it is the words that differ a little."""
    songs = [talk("<image>Sing!", SONG, picture) for picture in ("cat.png", "cup.png", "small.jpg")]
    songs.append(talk("<image>Sing!", SONG.replace("moon", "sun"), "cup.png"))
    file = open_file(write_records(tmp_path / "songs.jsonl", songs))
    scanning.scan([file], workers=1)
    assert groups_of(scanning.signatures([file])) == [Group(NEAR, [0, 2]), Group(NEAR, [1, 3])]


@pytest.mark.usefixtures("settings")
def test_a_file_that_is_read_in_another_way_is_scanned_again(tmp_path):
    data = write_records(tmp_path / "mapped.jsonl", [{"ask": "Two?", "say": "Two.", "other": "Three."}])
    found = []
    for answer in ("say", "other", "say"):
        file = open_file(data, fields={"question": "ask", "answer": answer})
        scanning.scan([file], workers=1)
        found += scanning.signatures([file]).text.tolist()
    assert found[0] == found[2] != found[1]


def test_words_that_would_be_ignored(settings, tmp_path):
    with pytest.raises(UserError, match="without --duplicates would be ignored"):
        data_inspect.main(settings, tmp_path / "out", part="1/2")
    for part in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(UserError, match=r"--part is"):
            data_inspect.main(settings, tmp_path / "out", duplicates=True, part=part)


def test_texts_are_compared_by_the_words_that_they_share():
    """The share of equal hashes is that of shared groups of three words: 16 hashes err by 0.12 (one sigma)."""
    draw = np.random.default_rng(1)
    words = [f"w{number}" for number in range(300)]
    errors = []
    for changed in (0, 3, 10, 30, 100):
        other = list(words)
        for place in draw.choice(300, changed, replace=False):
            other[place] = "x"
        groups = [{tuple(text[place : place + 3]) for place in range(298)} for text in (words, other)]
        jaccard = len(groups[0] & groups[1]) / len(groups[0] | groups[1])
        errors.append((min_hashes(words) == min_hashes(other)).sum() / NUM_HASHES - jaccard)
    assert errors[0] == 0
    assert max(map(abs, errors)) < 0.36  # three sigmas
    assert words_of({"messages": [{"role": "user", "content": "<image>A b,"}], "images": ["c"]}) == ["a", "b"]


def test_looks_of_pictures(tmp_path):
    distance = lambda first, second: (first ^ second).bit_count()
    cat, cup = (Image.fromarray(getattr(photographs, name)()) for name in ("chelsea", "coffee"))
    for name, image in {"a.png": cat, "b.jpg": cat.resize((150, 100)), "c.png": cat.convert("L"), "d.png": cup}.items():
        image.save(tmp_path / name)
    a, b, c, d = (look_of(File(str(tmp_path / name))) for name in ("a.png", "b.jpg", "c.png", "d.png"))
    assert distance(a, b) <= 3
    assert distance(a, c) <= 1
    assert distance(a, d) > 12
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    assert look_of(File(str(tmp_path / "white.png"))) is None
