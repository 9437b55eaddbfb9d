"""Every committed recipe, planned for the number of H100 that the model's file names: it fits, as fast as is told.

On two cores beside other work, a recipe took one to three seconds, and a search 22 to 216 with what it is held to.
"""

import json

import pytest
from test_dry_run import CONFIGS, MODELS, world_of
from test_plan_command import commands

RECIPES = [f"pretrain/stage{stage}" for stage in range(4)]
RECIPES += [f"tune/{method}{tuner}" for method in ("sft", "rm", "dpo", "kto") for tuner in ("", "-lora")]
RECIPES += ["tune/sft-lora-r8", *(f"align/{method}{tuner}" for method in ("grpo", "ppo") for tuner in ("", "-lora"))]
QUICK = [("8b", "tune/sft"), ("235b-a22b", "tune/sft")]
FEW_SECONDS, MINUTES = 600, 3600
"""Time-outs for a machine that does much else."""
FOUND = json.loads((CONFIGS.parent / "docs/benchmarks/recipe_layouts.json").read_text())


def planned(model: str, recipe: str, world1, *more: str, timeout: float = FEW_SECONDS):
    line = [str(CONFIGS / f"{recipe}.yaml"), "--gpus", str(world_of(model)), "--json", *more]
    (((status, shown, told),),) = world1.run(commands, [line], model, timeout=timeout)
    assert status == 0, told
    return json.loads(shown)


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        pytest.param(model, recipe, marks=[pytest.mark.slow] * ((model, recipe) not in QUICK))
        for model in MODELS
        for recipe in RECIPES
    ],
)
def test_a_recipe_fits(model, recipe, world1) -> None:
    plan = planned(model, recipe, world1)
    assert plan["spare_share"] == 0.05
    assert plan["spare"] >= 0.05 * plan["capacity"], f"{plan['spare'] / 2**30:.1f} GiB spare"
    assert plan["fits"]
    if (told := FOUND[model].get(recipe)) is not None:  # the file is not older than the recipe
        assert plan["time"]["seconds"] == pytest.approx(told["seconds"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tune/sft", "pretrain/stage1"])
@pytest.mark.parametrize("model", MODELS)
def test_a_search_finds_what_the_file_says(model, recipe, world1) -> None:
    """What of it is faster than the recipe is in comments: see tests/configs/test_recipe_layouts.py."""
    found = [one for one in planned(model, recipe, world1, "--search", timeout=MINUTES) if one["ruled_out"] is None]
    best, told = min(one["seconds"] for one in found), FOUND[model][recipe]["fastest"][0]["seconds"]
    assert best == pytest.approx(told, rel=0.02)
