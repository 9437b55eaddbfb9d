"""Every committed recipe, planned for the number of H100 that the model's file names: it fits, and is not slow.

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
# How many times faster the fastest other layout is predicted to be, at most, where it is not taken; and why.
ONE_FOR_ALL = "a model has one layout for all recipes, and others of these need the room; see the model's file"
NOT_TAKEN: dict[tuple[str, str], tuple[float, str]] = {
    ("32b", "tune/sft"): (1.16, ONE_FOR_ALL),
    ("32b", "pretrain/stage1"): (1.14, ONE_FOR_ALL),
    ("30b-a3b", "tune/sft"): (1.25, ONE_FOR_ALL),
    ("30b-a3b", "pretrain/stage1"): (1.20, ONE_FOR_ALL),
    ("235b-a22b", "tune/sft"): (1.29, "pieces of 512 tokens have not been timed; see the model's file"),
    ("235b-a22b", "pretrain/stage1"): (1.09, "it would leave 5 of 79 GiB"),
}


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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tune/sft", "pretrain/stage1"])
@pytest.mark.parametrize("model", MODELS)
def test_no_other_layout_is_predicted_to_be_much_faster(model, recipe, world1) -> None:
    own = planned(model, recipe, world1)["time"]["seconds"]
    found = [one for one in planned(model, recipe, world1, "--search", timeout=MINUTES) if one["ruled_out"] is None]
    best = min(found, key=lambda one: one["seconds"])
    times = own / best["seconds"]
    most, why = NOT_TAKEN.get((model, recipe), (1.05, "it would be taken"))
    assert times <= most, (times, best, why)
    if (model, recipe) in NOT_TAKEN:
        assert times > 1.05, f"no other layout is much faster now: {times}"
