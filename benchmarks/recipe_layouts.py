"""The layout of each committed recipe beside the fastest ones that a search predicts for the same number of H100.

    python -m benchmarks.recipe_layouts [--models NAME …] [--recipes NAME …] [--out FILE]

Nothing is measured: both are plans. What the file has already is not searched again, unless it is removed from it. With
another search beside it, one took 15 seconds to 14 minutes on two cores, the longest for rows of 262,144 tokens. The
lines about layouts that are more than 5 % faster belong in the comment of configs/models/MODEL.yaml: a test compares.
"""

import argparse
import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import write_text

RESULTS = Path("docs/benchmarks/recipe_layouts.json")
MODELS = ("2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b")
RECIPES = (
    *(f"pretrain/stage{stage}" for stage in range(4)),
    "tune/sft", "tune/sft-lora", "tune/sft-lora-r8", "tune/dpo", "tune/dpo-lora",
    "align/grpo", "align/grpo-lora", "align/ppo", "align/ppo-lora",
)  # fmt: skip
"""Without those of rm and kto, whose rows and passes are those of dpo."""
KEPT = 3  # layouts
MUCH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="default: all")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"the file with the results (default: {RESULTS})")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for recipe in args.recipes:
        for model in args.models:
            of_model = found.setdefault(model, {})
            if recipe not in of_model:
                of_model[recipe] = searched(model, recipe)
                write_text(args.out, json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(f"{model} {recipe}: {faster(model, recipe, of_model[recipe]) or 'nothing much faster'}", flush=True)


def searched(model: str, recipe: str) -> dict[str, Any]:
    """The plan of a recipe, and the fastest layouts of a search."""
    own, found = plan(model, recipe), plan(model, recipe, "--search")
    fit = sorted((one for one in found if one["ruled_out"] is None), key=lambda one: one["seconds"])
    return {
        "seconds": own["time"]["seconds"],
        "spare_gib": own["spare"] / 2**30,
        "fitting": len(fit),
        "fastest": [
            {"seconds": one["seconds"], "memory_gib": one["memory"] / 2**30, "changes": one["changes"]}
            for one in fit[:KEPT]
        ],
    }


def plan(model: str, recipe: str, *more: str) -> Any:
    """What `megavlm plan --json` prints for the number of GPUs that the model's file names."""
    from megavlm.cli.main import main as megavlm

    os.environ["MEGAVLM_MODEL"] = model
    gpus = re.match(r"# world: (\d+)", Path(f"configs/models/{model}.yaml").read_text())
    assert gpus is not None
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = megavlm(["plan", f"configs/{recipe}.yaml", "--gpus", gpus[1], "--json", *more])
    if status:
        raise SystemExit(f"{model} {recipe}: megavlm plan ended with status {status}")
    return json.loads(shown.getvalue())


def faster(model: str, recipe: str, result: dict[str, Any]) -> str | None:
    """The fastest layout beside the recipe's, and the settings that make it; None if it is not much faster."""
    from megavlm.config.load import load_settings
    from megavlm.search.candidate import Candidate
    from megavlm.search.search import different

    own, best = result["seconds"], result["fastest"][0]
    if own <= MUCH * best["seconds"]:
        return None
    os.environ["MEGAVLM_MODEL"] = model
    changes = different(Candidate(best["changes"]), load_settings(f"configs/{recipe}.yaml")).changes
    settings = " ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in changes.items())
    return f"{recipe}: {own:.3g} → {best['seconds']:.3g} s with {settings}"


if __name__ == "__main__":
    main()
