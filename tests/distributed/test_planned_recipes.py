"""Every committed recipe, planned for the number of H100 that the model's file names: it fits, as fast as is told.

On two cores beside other work, a recipe took one to three seconds, and a search 22 to 216 with what it is held to.
"""

import json
import re

import pytest
from cluster_recipes import CONFIGS, MODELS, RECIPES, fitting, offloaded, world_of
from test_plan_command import commands

QUICK = [("8b", "tune/sft"), ("235b-a22b", "tune/sft")]
FEW_SECONDS, MINUTES = 600, 3600
"""Time-outs for a machine that does much else."""
FOUND = json.loads((CONFIGS.parent / "docs/benchmarks/recipe_layouts.json").read_text())


WORLDS = [(model, world) for model in MODELS for world in sorted({world for world, _ in fitting(model)})]


def planned(model: str, recipe: str, world1, *more: str, world: int | None = None, timeout: float = FEW_SECONDS):
    line = [str(CONFIGS / f"{recipe}.yaml"), "--gpus", str(world or world_of(model)), "--json", *more]
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
    if told := FOUND[model].get(recipe):  # not rm and kto; the file is not older than the recipe
        assert plan["time"]["seconds"] == pytest.approx(told["seconds"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "world"), WORLDS)
def test_what_the_table_says_fits(model, world, world1) -> None:
    """Of configs/README.md."""
    recipes = [recipe for gpus, recipe in fitting(model) if gpus == world]
    plans = {recipe: planned(model, recipe, world1, world=world) for recipe in recipes}
    assert [recipe for recipe, plan in plans.items() if not plan["fits"]] == []


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        pytest.param(model, recipe, marks=[pytest.mark.slow] * ((model, recipe) != ("32b", "tune/sft")))
        for model, (_, recipes, _, _) in offloaded().items()
        for recipe in recipes
    ],
)
def test_what_fits_with_state_in_host_memory(model, recipe, world1) -> None:
    """Of the second table."""
    gpus, _, memory, seconds = offloaded()[model]
    plan = planned(model, recipe, world1, "train.offload_optimizer=true", world=gpus)
    assert plan["fits"]
    if recipe == "tune/sft":
        on_host = min(8, gpus) * max(stage["static"]["on_host"] for stage in plan["stages"])
        assert (round(on_host / 2**30), round(plan["time"]["seconds"], 1)) == (memory, seconds)


def test_what_the_documentation_says_of_32b(world1) -> None:
    """In docs/performance.md."""
    host, gpu = (
        planned("32b", "tune/sft", world1, f"train.offload_optimizer={on}", world=8) for on in ("true", "false")
    )
    seconds = [f"{plan['time']['seconds']:.1f}" for plan in (host, gpu)]
    memory = [f"{max(stage['total'] for stage in plan['stages']) / 2**30:.0f}" for plan in (host, gpu)]
    text = " ".join((CONFIGS.parent / "docs/performance.md").read_text().split())
    assert f"takes {seconds[0]} instead of {seconds[1]} seconds a step" in text
    assert f"needs {memory[0]} instead of {memory[1]} GiB on each GPU" in text


@pytest.mark.slow
def test_what_the_documentation_says_of_long_rows(world1) -> None:
    """In docs/performance.md: memory with and without the inputs of layers on the GPU, and the longest rows."""
    text = " ".join((CONFIGS.parent / "docs/performance.md").read_text().split())
    (settings,) = re.findall(r"`configs/tune/sft-lora.yaml ([^`]*train.recompute=full)`", text)
    ((longest, shorter),) = re.findall(r"rows that fit have (\d+)K instead of (\d+)K tokens", text)
    (memory,) = re.findall(r"needs (\d+ instead of \d+) GiB \(", text)
    (on_host,) = re.findall(r"recompute=full`\) and (\d+) GiB of the host's memory", text)

    def plan(on: bool, *more: str) -> dict:
        line = *settings.split(), "train.global_batch_size=8", f"train.offload_activations={str(on).lower()}", *more
        return planned("8b", "tune/sft-lora", world1, *line, world=1)

    plans = [plan(on)["stages"][0] for on in (True, False)]
    told = [stage["total"] / 2**30 for stage in plans]
    assert memory == f"{told[0]:.0f} instead of {told[1]:.0f}"
    assert [round(stage["on_host"] / 2**30) for stage in plans] == [int(on_host), 0]
    for on, tokens in ((True, int(longest)), (False, int(shorter))):
        assert plan(on, f"data.seq_length={tokens * 1024}")["fits"]
        assert not plan(on, f"data.seq_length={(tokens + 8) * 1024}")["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tune/sft", "pretrain/stage1"])
@pytest.mark.parametrize("model", MODELS)
def test_a_search_finds_what_the_file_says(model, recipe, world1) -> None:
    """What of it is faster than the recipe is in comments: see tests/configs/test_recipe_layouts.py."""
    found = [one for one in planned(model, recipe, world1, "--search", timeout=MINUTES) if one["ruled_out"] is None]
    best, told = min(one["seconds"] for one in found), FOUND[model][recipe]["fastest"][0]["seconds"]
    assert best == pytest.approx(told, rel=0.02)
