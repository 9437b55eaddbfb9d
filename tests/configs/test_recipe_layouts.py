"""Layouts that are predicted to be faster than a recipe's are named where its model's layout is."""

import json
from pathlib import Path

import cluster_recipes
import pytest

from benchmarks.recipe_layouts import MODELS, RECIPES, faster

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "docs/benchmarks/recipe_layouts.json").read_text())


def test_each_recipe_has_been_searched_for() -> None:
    assert set(FOUND) == set(MODELS)
    assert all(set(of_model) == set(RECIPES) for of_model in FOUND.values())
    others = {f"tune/{method}{tuner}" for method in ("rm", "kto") for tuner in ("", "-lora")}  # planned as those of dpo
    assert set(RECIPES) | others == set(cluster_recipes.RECIPES)


@pytest.mark.parametrize("model", MODELS)
def test_the_models_file_names_what_is_faster(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEGAVLM_MODEL", model)  # so that it is as before afterwards
    lines = (ROOT / f"configs/models/{model}.yaml").read_text().splitlines()
    text = " ".join(" ".join(line.removeprefix("#") for line in lines if line.startswith("#")).split())
    told = [line for recipe, result in FOUND[model].items() if (line := faster(model, recipe, result))]
    assert [line for line in told if line not in text] == []
    assert text.count(" s with ") == len(told)
