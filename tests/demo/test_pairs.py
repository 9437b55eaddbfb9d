"""Pairs of answers: made from training questions alone, right against wrong, and readable by the data path."""

import json

import pytest
from PIL import Image

from megavlm.demo.data import HELDOUT_FILE, read_records, write_records
from megavlm.demo.pairs import DIGITS, count_won, write_all_answers, write_drawn_pairs, write_pairs, write_some
from megavlm.records.preference import split_pair
from megavlm.records.records import check_record


@pytest.fixture
def questions(demo_data):
    return demo_data / "questions.jsonl"


def picture(path, record):
    """The one picture of a record of the file `path`, found as the data path finds it."""
    return Image.open(path.parent / record["images"][0]).tobytes()


def test_drawn_pairs_are_of_the_right_digit_and_each_wrong_one(questions, tmp_path):
    out = tmp_path / "tune" / "pairs.jsonl"
    out.parent.mkdir()
    asked = read_records(questions)
    assert write_drawn_pairs(questions, out) == len(asked) == len(read_records(out))
    drawn = set()
    for record, pair in zip(asked, read_records(out), strict=True):
        right, wrong, _ = split_pair(pair, "here")
        assert right["messages"] == record["messages"]
        assert check_record(wrong, "tune", "here").messages[1]["content"] == pair["rejected"]
        drawn.add((pair["chosen"], pair["rejected"]))
    assert picture(out, pair) == picture(questions, record)
    assert drawn == {(a, b) for a in DIGITS for b in DIGITS if a != b}
    first = out.read_bytes()
    write_drawn_pairs(questions, out)
    assert out.read_bytes() == first
    write_drawn_pairs(questions, out, seed=1)
    assert out.read_bytes() != first


def test_sampled_answers_make_pairs_where_they_are_wrong(questions, tmp_path):
    some, out = tmp_path / "some.jsonl", tmp_path / "pairs.jsonl"
    write_some(questions, some, every=1000)
    asked = read_records(some)
    assert [record["messages"] for record in asked] == [r["messages"] for r in read_records(questions)[::1000]]
    rights = [record["messages"][1]["content"] for record in asked]
    given = [rights[0], f" {rights[1]}\n", "", " \n", "a cat", rights[5] + rights[5]]
    assert write_pairs(some, given, out) == 2
    pairs = read_records(out)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(rights[4], given[4]), (rights[5], given[5])]
    assert picture(out, pairs[1]) == picture(questions, read_records(questions)[5000])
    with pytest.raises(ValueError, match="zip"):
        write_pairs(some, given[:-1], out)


def test_every_digit_answers_every_heldout_question(demo_data, tmp_path):
    heldout, out = demo_data / f"{HELDOUT_FILE}.jsonl", tmp_path / "answers.jsonl"
    write_all_answers(heldout, out)
    asked, lines = read_records(heldout), read_records(out)
    assert len(lines) == 10 * len(asked)
    for number, line in enumerate(lines):
        assert check_record(line, "tune", "here").messages[1]["content"] == str(number % 10)
        assert line["messages"][0] == asked[number // 10]["messages"][0]
    assert picture(out, lines[-1]) == picture(heldout, asked[-1])


def test_a_pair_is_won_by_the_higher_score():
    scores = [0.0] * 10 + [float(i) for i in range(10)]
    assert count_won(scores, ["3", "7"]) == 0 + 7  # a draw is no win
    scores[3] = 1.0
    assert count_won(scores, ["3", "7"]) == 9 + 7
    with pytest.raises(ValueError, match="19 scores for 2 questions"):
        count_won(scores[1:], ["3", "7"])


def test_no_heldout_picture_gets_into_pairs(demo_data, questions, tmp_path):
    heldout = {path for record in read_records(demo_data / f"{HELDOUT_FILE}.jsonl") for path in record["images"]}
    out = demo_data / "beside.jsonl"  # so that paths stay as they are
    write_drawn_pairs(questions, out)
    paths = {path for record in read_records(out) for path in record["images"]}
    out.unlink()
    assert paths
    assert not paths & heldout


def test_records_are_lines_of_json(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"a": "ä\n"}, {}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"a": "ä\\n"}\n{}\n'
    assert read_records(tmp_path / "a.jsonl") == [{"a": "ä\n"}, {}] == [json.loads(s) for s in ('{"a": "ä\\n"}', "{}")]
