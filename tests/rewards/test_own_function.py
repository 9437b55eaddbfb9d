"""Reward functions in Python files: what is said about files that cannot be used, and what a function gets."""

import sys

import pytest

from megavlm.base.errors import UserError
from megavlm.rewards.own_function import call, load_function


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.parametrize(
    ("source", "message", "remedy"),
    [
        ("def f(:\n", "FILE:1 cannot be used: SyntaxError: ", "repair the file"),
        ("import nothing_of_this_name\n", "FILE:1 cannot be used: ModuleNotFoundError: No module named", "repair"),
        ("\n\nx = 1 / 0\n", "FILE:3 cannot be used: ZeroDivisionError: division by zero", "repair"),
        ("open('missing')\n", "FILE:1 cannot be used: FileNotFoundError: ", "repair"),
        ("import sys\nsys.exit(1)\n", "FILE:2 cannot be used: SystemExit: 1", "repair"),
        ("import broken\n", "broken.py:2 cannot be used: SyntaxError: ", "repair"),
        ("def g(): ...\n", "FILE has no function f", "its functions: g"),
        ("f = 3\n", "FILE has something that is no function as f", "its functions: none"),
        (None, "FILE does not exist", "relative paths start from"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_line_and_cause(tmp_path, source, message, remedy):
    path = tmp_path / "mine.py"
    (tmp_path / "broken.py").write_text("\n=\n")
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError) as error:
        load_function(str(path), "f")
    assert message.replace("FILE", str(path)) in error.value.message
    assert remedy in error.value.remedy


def test_a_file_without_the_ending_of_python(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not a Python file"):
        load_function(f"{tmp_path}/mine.txt", "f")


def test_a_file_may_use_dataclasses_and_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("half = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour import half\n"
        "@dataclass\nclass Judge:\n    value: float\n"
        "def f(completions, **columns): return [Judge(half).value for _ in completions]\n"
    )
    assert call(load_function(f"{tmp_path}/mine.py", "f"), ["a", "b"], {}) == [0.5, 0.5]


def test_a_function_gets_the_columns_that_it_has_parameters_for():
    columns = {"answer": [1], "prompts": ["?"]}
    assert call(lambda completions: completions, ["a"], columns) == ["a"]
    assert call(lambda completions, answer: answer, ["a"], columns) == [1]
    assert call(lambda completions, **rest: rest, ["a"], columns) == columns

    async def awaited(completions, prompts):
        return prompts

    assert call(awaited, ["a"], columns) == ["?"]
