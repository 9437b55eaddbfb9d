"""The reward functions that need no library, each by a table of answers judged by hand; sums; the overlong penalty."""

import math
import time

import pytest

from megavlm.base.errors import UserError
from megavlm.rewards.choice import choice, chosen
from megavlm.rewards.functions import exact, format, length
from megavlm.rewards.score import Score, columns_of, overlong_penalty, score

ENDLESS = "the " * 50_000


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("A cat.", "a cat", 1),
        ("  a \n CAT ", "a cat", 1),
        ("“A cat!”", "A cat", 1),
        ("a-cat", "a cat", 0),
        ("5", 5, 1),
        ("-5", "5", 0),
        (".5", "5", 0),
        ("1,000", "1000", 0),  # numbers are for `math`
        ("ﬁve", "five", 1),  # a ligature
        ("", "5", 0),
        ("", "", 1),
        (ENDLESS, "the", 0),
        ("5<|im_end|>", "5", 1),
        ("5<|im_end|><|endoftext|>\n", "5", 1),
        ("5<|image_pad|>5", "5", 0),
        ("<|im_end|>5", "5", 0),
        ("<image>", "5", 0),
        ("<image>", "<image>", 1),
        ("<think>maybe 6</think>\n5", "5", 1),
        ("maybe 6</think>5", "5", 1),
        ("<think>5", "5", 0),  # cut off while thinking
        ("5<think>6", "5", 1),
        ("<think>x</think><answer>5</answer>", "5", 1),
        ("<answer>5</answer><answer>6</answer>", "5", 0),
        ("<answer>5</answer> or <answer>", "5", 1),
        ("the answer is 5", "5", 0),
        ("grey", ["gray", "grey"], 1),
    ],
)
def test_exact(completion, answer, value):
    assert exact(field="answer", strict=False)([completion], answer=[answer]) == [value]


def test_strict_exact_tells_case_and_punctuation_apart():
    answers = ["A cat.", "a cat.", "A cat", " A cat.\n"]
    assert exact(field="answer", strict=True)(answers, answer=["A cat."] * 4) == [1, 0, 0, 1]


def test_a_record_without_an_answer_gets_none_and_one_with_an_assistant_message_has_one():
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    judge = exact(field="answer", strict=False)
    assert judge(["yes", "yes"], answer=["no", None], messages=[said, said]) == [0, 1]
    assert judge(["yes", "yes"], messages=[said[:1], said]) == [None, 1]
    assert judge(["yes"], question=["?"]) == [None]
    assert exact(field="label", strict=False)(["yes"], label=["yes"], answer=["no"]) == [1]
    with pytest.raises(UserError, match="the field answer of the record is"):
        judge(["yes"], answer=[{"text": "yes"}])


FRUIT = ["apple", "pear", "apple pie", "none of them"]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("**B**", 1),
        ("The answer is (B).", 1),
        ("the answer is B because B is sweet.", 1),
        ("Answer: **B**", 1),
        ("I would choose option B.", 1),
        (r"So \boxed{B}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{A}, no: \boxed{B}", 1),
        (r"\boxed{B}, no: \boxed{A}", 0),
        ("pear", 1),
        ("Pear.", 1),
        ("It is a pear.", 1),
        ("B. pear", 1),
        ("(B) pear", 1),
        ("<think>A? (C)?</think>B", 1),
        ("<think>B</think>", 0),
        ("The answer is A. Wait, the answer is B.", 1),
        ("The answer is B. Wait, the answer is A.", 0),
        ("The answer is B or C.", 0),
        ("(A) (B) (C) (D)", 0),
        ("an apple or a pear", 0),
        ("apple pie", 0),
        ("A pear", 1),  # the article is no choice
        ("The answer is E", 0),
        ("A", 0),
        ("", 0),
        ("Because", 0),
        (ENDLESS, 0),
        ("B<|im_end|>", 1),
        ("<image>", 0),
        ("<answer>B</answer>", 1),
    ],
)
def test_choice(completion, value):
    judge = choice(field="answer", choices="choices")
    assert judge([completion], answer=["B"], choices=[FRUIT]) == [value]
    assert judge([completion], answer=["pear"], choices=[FRUIT]) == [value]
    assert judge([completion], answer=["(B)"], choices=[dict(zip("abcd", FRUIT, strict=True))]) == [value]


@pytest.mark.parametrize(
    "text", ["(A) (B) (C) (D)", "A. B. C. D.", "**A** **D**", "an apple or a pear", "The answer is B, C", ENDLESS]
)
def test_who_chooses_several_options_or_none_chooses_none(text):
    assert chosen(text, dict(zip("ABCD", FRUIT, strict=True))) is None


def test_choice_without_texts_and_with_letters_in_them():
    judge = choice(field="answer", choices="options")
    assert judge(["It is B", "The answer is B", "B"], answer=["B."] * 3) == [0, 1, 1]
    assert judge(["pear", "3"], answer=["B", "A"], options=[["A. apple", "B. pear"], ["3", "2"]]) == [1, 1]
    assert judge(["B"], options=[FRUIT]) == [None]
    for answer, listed in (("kiwi", FRUIT), ("E", FRUIT), ("B", "apple, pear")):
        with pytest.raises(UserError, match="of the record is"):
            judge(["B"], answer=[answer], options=[listed])


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>hm</think><answer>5</answer>", 1),
        ("<think>\nhm\n</think>\n\n<answer> 5 </answer>\n<|im_end|>", 1),
        ("<think></think><answer>5</answer>", 1),
        ("<think>hm</think><answer> </answer>", 0),
        ("<think>hm</think>5", 0),
        ("hm</think><answer>5</answer>", 0),
        ("so <think>hm</think><answer>5</answer>", 0),
        ("<think>hm</think> so <answer>5</answer>", 0),
        ("<think>hm</think><answer>5</answer> so", 0),
        ("<think>hm</think><answer>5</answer><answer>6</answer>", 0),
        ("<think><answer>hm</think>5</answer>", 0),
        ("<answer>5</answer><think>hm</think>", 0),
        ("<think>hm<answer>5</answer>", 0),
        ("", 0),
        ("<think>" * 20_000, 0),
        ("<image>", 0),
    ],
)
def test_format(completion, value):
    assert format(pattern=None, prompt_opens=False)([completion]) == [value]


def test_format_of_ones_own_and_after_a_prompt_that_opens():
    answers = ["12. a\nb.<|im_end|>", "x 12. a.", "12. a. b"]
    assert format(pattern=r"\d+\.(.*)\.", prompt_opens=False)(answers) == [1, 0, 0]
    opened = format(pattern=None, prompt_opens=True)
    assert opened(["hm</think><answer>5</answer>", "<think>hm</think><answer>5</answer>"]) == [1, 0]


def test_length():
    assert length(limit=4, margin=None, unit="characters")(["", "1234<|im_end|>", "12345", "x" * 8, "x" * 99]) == [
        0, 0, -0.25, -1, -1,
    ]  # fmt: skip
    assert str(length(limit=4, margin=None, unit="characters")([""])) == "[0.0]"  # not -0.0
    assert length(limit=2, margin=4, unit="words")(["a b", " a  b\nc ", ENDLESS]) == [0, -0.25, -1]


@pytest.mark.parametrize(
    "text", ["<answer>", r"\boxed{", "<think>", "</think>", "(B)", "answer is ", "<|a|>", "**", "\n"]
)
def test_endless_answers_take_no_time(text):
    """At worst in proportion to their length; a search that is quadratic takes minutes for these 400,000 characters."""
    completion, began = text * (400_000 // len(text)), time.process_time()
    exact(field="answer", strict=False)([completion], answer=["B"])
    choice(field="answer", choices="choices")([completion], answer=["B"], choices=[FRUIT])
    format(pattern=None, prompt_opens=False)([completion])
    assert time.process_time() - began < 3


def test_a_sum_is_float64_and_unknown_if_a_part_is():
    weights = {"a": 0.1, "b": 0.2, "watched": 0.0}
    assert score({"a": 1.0, "b": 1.0}, [], weights).total == 0.1 + 0.2
    assert score({"a": 3.0, "b": None}, [], weights).total == 0.1 * 3.0
    assert score({"a": 3.0, "b": None}, ["b: it raised"], weights) == Score(
        None, {"a": 3.0, "b": None}, ["b: it raised"]
    )
    assert score({"a": 3.0, "watched": None}, ["watched: it raised"], weights).total == 0.1 * 3.0
    assert score({"a": None, "watched": 1.0}, [], weights).total is None
    assert score({}, [], weights).total is None
    assert score({"a": 0.0}, [], weights).total == 0.0


def test_columns():
    assert columns_of({"answer": 5, "completions": 1, "prompts": 2}, "?", 2) == {
        "answer": [5, 5],
        "prompts": ["?", "?"],
    }


def test_overlong_penalty():
    """DAPO's numbers: L_max 20480, L_cache 4096."""
    for tokens, penalty in [(0, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (30000, -1)]:
        assert math.isclose(overlong_penalty(tokens, 20480, 4096), penalty, abs_tol=1e-12)
    with pytest.raises(AssertionError):
        overlong_penalty(1, 10, 0)
