"""The reward math: equal numbers and formulas in many forms, and answers that only look right."""

import pytest

from megavlm.base.errors import UserError
from megavlm.rewards.mathematics import math, result_of

ENDLESS = "1 " * 20_000


@pytest.fixture(scope="module")
def judge():
    return math(field="answer", decimals=6)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 42.", "42"),
        (r"So \boxed{42}", 42),
        (r"\boxed{0.5}", r"$\frac{1}{2}$"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{\dfrac{2}{4}}", "0.5"),
        ("50%", "0.5"),
        (r"\boxed{50\%}", "50"),
        ("1,000", "1000"),
        (r"\boxed{1000}", "1,000"),
        ("-3", "-3"),
        (r"\boxed{−3}", "-3"),
        ("It is 12 cm.", "12"),
        (r"\boxed{12\text{ cm}}", "12 cm"),
        (r"\boxed{x+1}", "1+x"),
        ("x+1", "$1+x$"),
        (r"\boxed{(x-1)(x+1)}", "x^2-1"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{5}", "x=5"),
        (r"\boxed{2, 1}", r"\{1, 2\}"),
        ("1e3", "1000"),
        ("1000", "1e3"),
        ("0.3333333", r"\frac{1}{3}"),
        ("72", "Half of 144 is 72.\n#### 72"),
        ("first 3, then 4", "4"),
        ("It costs $5.", "5"),
        ("Answer: cat", "Cat"),
        (r"\boxed{\text{cat}}", "cat"),
        ("The answer is: no.", "No"),
        ("<think>41</think>42<|im_end|>", "42"),
        ("<think>41</think><answer>42</answer>", "42"),
        (ENDLESS + r"\boxed{5}", "5"),
    ],
)
def test_equal(judge, completion, answer):
    assert judge([completion], answer=[answer]) == [1]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "5"),
        (r"\boxed{}", "5"),
        (r"\boxed{5", "6"),
        ("-3", "3"),
        (r"\boxed{1}, no: \boxed{2}", "1"),
        (r"\boxed{5 or 6}", "5"),
        ("1, 2, 3", "3"),
        ("4 is not the answer, 3 is", "4"),
        ("0.333", r"\frac{1}{3}"),
        (r"\boxed{act}", "cat"),
        ("Act", "cat"),
        ("on", "no"),
        ("1", "1e3"),
        (r"\boxed{x \leq 3}", r"x \geq 3"),
        (r"\boxed{(2,1)}", "(1,2)"),
        ("<image>", "5"),
        ("<|image_pad|>", "0"),
        ("<think>42", "42"),
        (ENDLESS, "5"),
        (r"\boxed{" + ENDLESS + "}", "5"),
        (r"\boxed{" * 1000, "5"),
        ("$" * 1000, "5"),
        ("(" * 1000, "5"),
        (r"\frac{" * 100, "5"),
    ],
)
def test_unequal(judge, completion, answer):
    assert judge([completion], answer=[answer]) == [0]


def test_several_right_answers_or_none(judge):
    assert judge(["1/2", "2"], answer=[["1", "0.5"], None]) == [1, None]
    with pytest.raises(UserError, match="is neither a number nor a formula"):
        judge(["5"], answer=[""])


def test_the_result_of_an_answer():
    assert result_of("So\nthe answer is: **$x$**.\n") == "x"
    assert result_of(r"\boxed{\frac{1}{2}} is it") == r"\frac{1}{2}"
