"""Layouts that are predicted to be faster than a recipe's are named where its model's layout is."""

import json
from pathlib import Path

import pytest

from benchmarks.recipe_layouts import MODELS, RECIPES

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "docs/benchmarks/recipe_layouts.json").read_text())


def test_only_recipes_that_exist_are_in_the_file() -> None:
    assert set(FOUND) == set(MODELS)
    assert all(set(of_model) <= set(RECIPES) for of_model in FOUND.values())


@pytest.mark.parametrize("model", MODELS)
def test_the_models_file_names_what_is_faster(model: str) -> None:
    text = (ROOT / f"configs/models/{model}.yaml").read_text()
    for recipe, result in FOUND[model].items():
        own, best = result["seconds"], result["fastest"][0]["seconds"]
        told = f"#   {recipe}: {own:.3g} → {best:.3g} s with "
        assert (told in text) == (own > 1.05 * best), told
