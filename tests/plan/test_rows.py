"""How many rows a plan gives to a rank."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megavlm.config.load import load_settings
from megavlm.plan.rows import rows_of_rank

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Answers:
    """Rows with this many answers each."""

    segments: int


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.delenv("MEGAVLM_MODEL", raising=False)


def rows(recipe: str, *changes: str, segments: int = 2, data_parallel: int = 8) -> int:
    settings = load_settings(CONFIGS / recipe, [*changes])
    return rows_of_rank(settings, Path(recipe).stem, Answers(segments), data_parallel)


@pytest.mark.parametrize(
    ("changes", "segments", "data_parallel", "expected"),
    [
        ([], 2, 8, 128),  # 128 prompts × 16 answers / 2 / 8
        ([], 2, 16, 64),
        ([], 4, 8, 64),
        (["align.mini_batches=4"], 2, 8, 32),
        (["rollout.prompts=120", "rollout.group_size=3"], 2, 8, 23),  # 180 rows
        (["parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=2"], 2, 3, 344),  # of 342
    ],
)
def test_layouts_of_a_method_that_samples_share_the_same_answers(changes, segments, data_parallel, expected) -> None:
    assert rows("align/grpo.yaml", *changes, segments=segments, data_parallel=data_parallel) == expected


def test_ppo_asks_each_prompt_once() -> None:
    assert rows("align/ppo.yaml") == 16  # 1,024 answers in four mini-batches, two in a row


def test_without_prompts_some_rows_are_assumed() -> None:
    assert rows("align/grpo.yaml", "rollout.prompts=null", "parallel.tensor=1", "parallel.pipeline=2") == 8


def test_other_methods_have_the_rows_of_the_settings() -> None:
    assert rows("tune/sft.yaml") == 128 // 8
