"""Time of a DPO step on pairs with pictures if the tower encodes pictures once per pair, or once per answer.

    python -m benchmarks.pairs [--steps N] [--json FILE]

There are eight prompts, each with a real photograph of 384 × 384 px and two short answers, in rows of 1,024 tokens. A
toy decoder with 4 layers of width 128 and a tower with 8 layers of width 256 run in float32 on one process. A trainer
without support for pairs encodes the pictures once per answer. Steps of the two kinds alternate, medians are compared,
and the losses must be equal.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ranks import versions

MIN_RATIO, PAIRS = 1.3, 8


def make(root: Path) -> Path:
    """Writes a model folder, pictures and pairs."""
    import skimage.data
    from PIL import Image

    from megavlm.demo.model_folder import make_model_folder

    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((384, 384)).save(root / f"{name}.png")
    names = ["astronaut", "chelsea", "coffee", "rocket"] * 2
    records = [
        {"prompt": f"<image>What is picture {number}?", "chosen": f"It is {name}.", "rejected": "I cannot say that.",
         "images": [f"{name}.png"]}
        for number, name in enumerate(names[:PAIRS])
    ]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    vision = {"hidden_size": 256, "intermediate_size": 1024, "depth": 8, "num_heads": 8}
    return make_model_folder(root / "model", text={"num_hidden_layers": 4}, vision=vision)


def measure(root: Path, folder: Path, steps: int) -> dict:
    from dataclasses import replace

    from megavlm import platform
    from megavlm.align.objectives import PairObjective
    from megavlm.config.settings import Settings
    from megavlm.data.answer_groups import draft_unit
    from megavlm.data.renderer import Renderer
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.sources.jsonl import JsonlFile
    from megavlm.training.step import Step

    settings = Settings(
        model={"hf": folder}, data={"seq_length": 1024},
        train={"precision": "fp32", "optimizer": "sgd", "lr": 1e-9, "steps": 100, "global_batch_size": 4},
    )  # fmt: skip
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    renderer, file = Renderer(folder, settings.data), JsonlFile(root / "pairs.jsonl")
    shared, apart = [], []
    for first in range(0, PAIRS, 2):
        drafts = [draft_unit(renderer, file, place, "pair") for place in (first, first + 1)]
        shared.append(renderer.complete_row(drafts))
        samples = []
        for draft in drafts:
            chosen, (rejected,) = renderer.complete(draft), draft.followers
            twin = replace(renderer.complete(rejected), pixels=chosen.pixels, shares_media=False)
            samples += [chosen, twin]
        apart.append(renderer.pack(samples))
    optimizers, seconds, losses, frames = Optimizers(vlm, settings.train), {}, {}, {}
    for turn in range(steps + 1):  # the first step is a warm-up
        for name, rows in (("once per pair", shared), ("once per answer", apart)):
            objective = PairObjective("simpo", {}, 1024, groups.language.cp)
            step = Step(vlm, optimizers, Feed(vlm, iter(rows)), len(rows), objective)
            began = time.perf_counter()
            result = step()
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - began)
            losses[name], frames[name] = result.loss, int(result.counts["frames_encoded"])
    once, twice = losses.values()
    assert abs(once / twice - 1) < 1e-6, losses
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    ratio = round(medians["once per answer"] / medians["once per pair"], 3)
    return {"pairs": PAIRS, "frames_encoded": frames, "step_seconds": medians, "ratio": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9, help="number of steps of each kind (default: 9)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megavlm-pairs-") as root:
        result = measure(Path(root), make(Path(root)), args.steps)
    for name, value in result["step_seconds"].items():
        print(f"{name}: {value:.3f} s a step, {result['frames_encoded'][name]} frames encoded")
    print(f"{result['ratio']:.2f} times faster; at least {MIN_RATIO} times: {result['ratio'] >= MIN_RATIO}")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": versions(), **result}, indent=1) + "\n")
    return 0 if result["ratio"] >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
