"""The examples of docs/rewards.md do what the page says."""

import re
import sys
from pathlib import Path

from megavlm.config.load import load_settings
from megavlm.rewards.own_function import call, load_function

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_settings_can_be_used(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {hf: folder}\n" + block("yaml"))
    rewards = load_settings(tmp_path / "my.yaml").reward
    assert [(reward.key, reward.weight) for reward in rewards] == [
        ("math", 1.0),
        ("format", 0.2),
        ("brief", 0.1),
        ("taste", 1.0),
    ]


def test_the_reward_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "documented.py").write_text(block("python"))
    brief = load_function(f"{tmp_path}/documented.py", "brief")
    columns = {"answer": ["cat", "cat", "cat", None], "prompts": ["?"] * 4}
    assert call(brief, ["cat", "a cat!", "dog", "cat"], columns) == [1, 0.5, 0, None]
