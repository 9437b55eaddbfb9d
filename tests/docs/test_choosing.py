"""docs/choosing.md: the values in its table are those that a run of the recipe would have."""

import re
from pathlib import Path

import pytest

from megavlm.align import kto
from megavlm.align.losses.policy import POLICY_LOSSES
from megavlm.align.losses.preference import PREFERENCE_LOSSES
from megavlm.align.registry import METHODS, make_method
from megavlm.align.sampling_checks import GROUP_SIZES
from megavlm.base import yaml_files
from megavlm.config import describe
from megavlm.config.load import load_settings
from megavlm.config.settings import Settings
from megavlm.reinforcement.policy import Policy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
ROWS = [
    (CODE.findall(verb)[0], *CODE.findall(recipe)[0].split(), CODE.findall(values))
    for _, verb, recipe, values in (
        line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.count(" | ") == 3 and "`configs/" in line
    )
]


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("MODEL", "MODELS", "DATA", "RUNS"):
        monkeypatch.delenv(f"MEGAVLM_{name}", raising=False)


def resolved(key: str, verb: str, settings: Settings) -> object:
    """The value of a setting in a run: what a null of ``align`` or ``rollout`` means is asked of the method."""
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    if value is not None:
        return value
    name = key.rpartition(".")[2]
    if METHODS[verb].samples:
        policy = Policy.of(settings, verb)
        found = {
            "beta": policy.options.beta or policy.kl_in_reward,
            "replace_flat": policy.replacements,
            "group_size": GROUP_SIZES[verb],
            **POLICY_LOSSES[policy.options.loss].options,
        }
        return found[name]
    if verb == "kto":
        return {"beta": kto.BETA}[name]
    loss = settings.align.loss or "sigmoid"
    if name == "loss":
        return loss
    defaults = PREFERENCE_LOSSES[loss].options
    return 0.55 * defaults["beta"] if name == "gamma" else defaults[name]


def test_the_table_has_every_recipe_of_tuning_and_reinforcement_learning() -> None:
    named = {path for _, path, *_ in ROWS}
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("tune", "align")
        for path in ROOT.glob(f"configs/{folder}/*.yaml")
    }
    assert there == named
    assert {verb for verb, *_ in ROWS} == METHODS.keys() - {"pretrain"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[1:-1]))
def test_the_recipe_has_the_values_of_the_table(row: tuple) -> None:
    verb, path, *overrides, values = row
    settings = load_settings(ROOT / path, overrides)
    make_method(verb, settings)  # refuses what the method would ignore
    assert values
    for text in values:
        key, _, written = text.partition("=")
        assert resolved(key, verb, settings) == pytest.approx(yaml_value(written)), key


def yaml_value(text: str) -> object:
    """A value as an override has it; a number as a float."""
    (value,) = yaml_files.parse_override(f"x={text}").tree.values()
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_lora_of_rank_8_is_there() -> None:
    values = next(row[-1] for row in ROWS if row[1] == "configs/tune/sft-lora-r8.yaml")
    assert {"adapter.rank=8", "adapter.alpha=32", "adapter.dropout=0.05"} <= set(values)


def test_every_setting_that_the_page_names_exists() -> None:
    sections = {key.partition(".")[0] for key in keys()}
    named = {match[1] for match in re.finditer(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", PAGE)}
    assert not {key for key in named if key.partition(".")[0] in sections} - keys()


def keys() -> set[str]:
    return {entry.key for entry in describe.entries()}


def test_replayed_samples_are_a_third_or_so_by_default() -> None:
    entry = next(entry for entry in describe.entries() if entry.key == "data.replay")
    assert entry
    replay = Settings(model={"hf": "x"}, data={"replay": {"sources": [{"path": "a.jsonl"}]}}).data.replay
    assert replay is not None
    assert replay.share == 0.3
