"""Every committed recipe, planned for the number of H100 that the model's file names: it fits, and is not slow."""

import json

import pytest
from test_dry_run import CONFIGS, MODELS, world_of
from test_plan_command import commands

FULL = ["pretrain/stage0", "pretrain/stage1", "pretrain/stage2", "pretrain/stage3"]
FULL += [f"{method}{tuner}" for method in ("tune/sft", "tune/rm", "tune/dpo", "tune/kto") for tuner in ("", "-lora")]
FULL += ["tune/sft-lora-r8", *(f"align/{m}{t}" for m in ("grpo", "ppo") for t in ("", "-lora"))]
QUICK = [("8b", ["tune/sft"]), ("235b-a22b", ["tune/sft"])]
SEARCHED = ["pretrain/stage1", "tune/sft"]


def planned(model: str, recipes: list[str], world1, *more: str) -> dict:
    lines = [[str(CONFIGS / f"{recipe}.yaml"), "--gpus", str(world_of(model)), "--json", *more] for recipe in recipes]
    (found,) = world1.run(commands, lines, model)
    assert all(status == 0 for status, *_ in found), [told for *_, told in found]
    return {recipe: json.loads(shown) for recipe, (_, shown, _) in zip(recipes, found, strict=True)}


def check(model: str, recipes: list[str], world1) -> None:
    plans = planned(model, recipes, world1)
    tight = {recipe: f"{plan['spare'] / 2**30:.1f} GiB spare" for recipe, plan in plans.items() if not plan["fits"]}
    assert not tight, (model, tight)


@pytest.mark.parametrize(("model", "recipes"), QUICK)
def test_a_recipe_fits(model, recipes, world1) -> None:
    check(model, recipes, world1)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_fits(model, world1) -> None:
    check(model, FULL, world1)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_no_other_layout_is_predicted_to_be_much_faster(model, world1) -> None:
    own = planned(model, SEARCHED, world1)
    for recipe, found in planned(model, SEARCHED, world1, "--search").items():
        seconds = own[recipe]["time"]["seconds"]
        faster = [c for c in found if c["ruled_out"] is None and c["seconds"] < seconds / 1.05]
        assert not faster, (model, recipe, seconds, faster[:3])
