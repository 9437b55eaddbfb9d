"""The recipes and models of configs/, the GPUs that a model's file names, and the table of others in its README."""

import fnmatch
import re
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = ["2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b"]
STAGES = [f"pretrain/stage{stage}" for stage in range(4)]
METHODS = ["tune/sft", "tune/rm", "tune/dpo", "tune/kto", "align/grpo", "align/ppo"]
RECIPES = [*STAGES, *(f"{method}{tuner}" for method in METHODS for tuner in ("", "-lora")), "tune/sft-lora-r8"]


def world_of(model: str) -> int:
    """The number of GPUs for which a model's layout is meant."""
    first_line = (CONFIGS / f"models/{model}.yaml").read_text().splitlines()[0]
    return int(re.fullmatch(r"# world: (\d+)", first_line)[1])


def offloaded() -> dict[str, tuple[int, list[str], int, float]]:
    """GPUs, recipes, GiB of a host's memory and seconds of tune/sft, by model, of configs/README's second table."""
    table = [line.strip("| \n").split(" | ") for line in (CONFIGS / "README.md").read_text().splitlines()]
    first = next(number for number, cells in enumerate(table) if cells[1:2] == ["GPUs"]) + 2
    return {
        model.strip("`"): (
            int(gpus),
            [recipe for recipe in RECIPES for one in re.findall(r"`(.+?)`", cell) if fnmatch.fnmatch(recipe, one)],
            int(memory),
            float(seconds),
        )
        for model, gpus, cell, memory, seconds in table[first : first + len(MODELS)]
    }


def fitting(model: str) -> list[tuple[int, str]]:
    """(GPUs, recipe) of the model's line in the table of configs/README.md."""
    table = [line.strip("| \n").split(" | ") for line in (CONFIGS / "README.md").read_text().splitlines()]
    worlds = next(cells for cells in table if cells[0] == "model")[2:]
    cells = next(cells for cells in table if cells[0] == f"`{model}`")[2:]
    found = []
    for world, cell in zip(worlds, cells, strict=True):
        some, _, none = ([*re.findall(r"`(.+?)`", part)] for part in cell.partition(" but "))
        matching = lambda patterns: {r for r in RECIPES if any(fnmatch.fnmatch(r, pattern) for pattern in patterns)}
        found += [(int(world.replace(",", "")), recipe) for recipe in sorted(matching(some) - matching(none))]
    return found
