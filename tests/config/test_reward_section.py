"""The settings of rewards: what is refused, and what follows from what is given."""

from pathlib import Path

import pytest

from megavlm.config.load import load_settings, resolved_yaml
from megavlm.config.settings import RewardSettings, Settings
from megavlm.output.changes import is_changeable, is_free

HF = "model: {hf: folder}\n"


@pytest.mark.parametrize(
    ("rewards", "message", "remedy"),
    [
        ("{weight: 1.0}", "a reward has either name, python or model; this one has none of them", "one of them"),
        ("{name: exact, model: rm}", "this one has name and model", "one of them"),
        ("{name: wrong}", "reward[0].name is 'wrong'", None),
        (
            "{name: exact, limit: 5}",
            "the reward exact has limit 5, which would be ignored: it is only for length",
            "limit",
        ),
        ("{name: length, limit: 5, field: x}", "only for exact or math or choice", "remove field"),
        ("{python: 'a.py:f', strict: true}", "the reward f has strict True, which would be ignored", "remove strict"),
        ("{model: runs/rm, timeout: 5.0}", "the reward rm has timeout 5, which would be ignored", "remove timeout"),
        ("{python: a.py}", "a reward has python 'a.py', which is not FILE.py:FUNCTION", "for example rewards.py:short"),
        ("{python: 'a.py:'}", "which is not FILE.py:FUNCTION", "for example"),
        ("{python: ':f'}", "which is not FILE.py:FUNCTION", "for example"),
        ("{name: length}", "the reward length has no limit", "give it a limit"),
        ("{name: format, pattern: '('}", "has the pattern '(', which is not a regular expression", "expression"),
        ("{name: format, pattern: x, prompt_opens: true}", "prompt_opens would be ignored", "remove prompt_opens"),
        ("{name: exact}, {name: exact}", "several rewards have the name exact", "a label of its own"),
        ("{name: exact, label: f}, {python: 'a.py:f'}", "several rewards have the name f", "a label"),
        ("{name: exact, weight: 0.0}", "all rewards have weight 0", "give one of them a weight"),
        ("{name: exact, label: 'a: b'}", "reward[0].label is 'a: b'", None),
        ("{name: exact, timeout: 0.0}", "reward[0].timeout is 0", None),
        ("{name: exact, wieght: 1.0}", "unknown setting reward[0].wieght", "did you mean reward[0].weight?"),
    ],
)
def test_refused(refused, rewards, message, remedy):
    error = refused(HF, f"reward=[{rewards}]")
    assert message in error.message
    assert remedy is None or remedy in error.remedy


def test_what_follows_from_a_reward(tmp_path):
    rewards = [
        RewardSettings(name="length", limit=5),
        RewardSettings(python="~/dir:x/mine.py:judge", label="own", timeout=2.0),
        RewardSettings(model="runs/my rm"),
        RewardSettings(name="format", label="form", weight=0.0),
    ]
    assert [reward.key for reward in rewards] == ["length", "own", "my_rm", "form"]
    assert [reward.seconds for reward in rewards[:2]] == [10, 2]
    assert RewardSettings(python="a.py:f").seconds == 60
    assert (rewards[1].file, rewards[1].function) == (Path.home() / "dir:x/mine.py", "judge")
    assert rewards[0].options == {"limit": 5, "margin": None, "unit": "characters"}
    assert rewards[1].options == {}
    settings = Settings(model={"hf": "x"}, reward=rewards)
    (tmp_path / "config.yaml").write_text(resolved_yaml(settings))
    assert load_settings(tmp_path / "config.yaml") == settings


def test_a_run_may_continue_with_other_weights_if_asked_and_with_more_workers():
    assert is_changeable("reward[0].weight")
    assert not is_free("reward[0].weight")
    assert is_free("reward_pool.workers")
