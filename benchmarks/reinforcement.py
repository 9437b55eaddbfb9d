"""Right answers of the demo's model before and after reinforcement learning, with several seeds and all methods.

    python -m benchmarks.reinforcement [--demo DIR] [--seeds 0 1 2] [--work DIR] [--json FILE]

The folder DIR of ``make demo`` has the pretrained model and the data. A model that often errs is fine-tuned once, as in
``make demo-rl``. GRPO goes on from it with each seed, which decides the order of the questions and the sampled answers,
and 360 held-out questions are answered greedily. Each other loss and advantage learns for ten steps with the first
seed and two updates in a step; their rewards at the beginning and at the end are compared. What a former call has left
in ``--work`` is not run again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ranks import versions
from megavlm.demo.answers import accuracy_of
from megavlm.demo.commands import CONFIGS, DEFAULT_OUT, NPROC, run
from megavlm.demo.rl import OTHER_SETTINGS, OTHER_STEPS, OTHERS, rewards_at_ends
from megavlm.demo.run import Demo


def measure(demo: Demo, work: Path, seeds: list[int]) -> dict:
    weak, grpo = CONFIGS / "weak.yaml", CONFIGS / "grpo.yaml"
    start, load = work / "weak", f"model.load={work / 'weak'}"
    if not (start / "checkpoints").is_dir():
        run("megavlm", "sft", weak, f"output={start}", *NPROC)
    before = _accuracy(demo, weak, start)
    after, seconds, rewards = [], [], {}
    for seed in seeds:
        output = work / f"grpo-{seed}"
        seconds.append(_train(grpo, output, load, f"train.seed={seed}"))
        after.append(_accuracy(demo, grpo, output))
        rewards[f"grpo, seed {seed}"] = rewards_at_ends(output)
    for name, settings in OTHERS.items():
        output, seed = work / name, f"train.seed={seeds[0]}"
        _train(grpo, output, load, *settings, *OTHER_SETTINGS, seed, f"train.steps={OTHER_STEPS}", steps=OTHER_STEPS)
        rewards[name] = rewards_at_ends(output)
    return {
        "seeds": seeds,
        "right_before": round(before, 4),
        "right_after": [round(share, 4) for share in after],
        "mean_gain": round(statistics.mean(after) - before, 4),
        "seconds_of_steps": [round(value, 1) for value in seconds],
        "rewards_first_and_last": {name: [round(value, 4) for value in ends] for name, ends in rewards.items()},
    }


def _train(config: Path, output: Path, *settings: str, steps: int = 30) -> float:
    """Trains unless that is done. Returns the seconds of all steps."""
    if not (output / "checkpoints" / f"step_{steps:08d}").is_dir():
        run("megavlm", "grpo", config, *settings, f"output={output}", *NPROC)
    return sum(json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines())


def _accuracy(demo: Demo, config: Path, trained: Path) -> float:
    answers = trained.with_name(f"{trained.name}-answers")
    if not (answers / "answers.jsonl").is_file():
        run("megavlm", "infer", config, f"model.load={trained}", f"output={answers}", *NPROC)
    return accuracy_of(answers, demo.questions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default=DEFAULT_OUT, help=f"the folder of `make demo` (default: {DEFAULT_OUT})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of GRPO (default: 0 1 2)")
    parser.add_argument("--work", help="folder for the runs (default: a temporary one)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    work, file = (os.path.abspath(path) if path else None for path in (args.work, args.json))
    demo, began = Demo(Path(args.demo)), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="megavlm-rl-") as temporary:
        result = measure(demo, Path(work or temporary), args.seeds)
    print(f"right answers: {result['right_before']:.1%} before, after GRPO {result['right_after']}")
    for name, (first, last) in result["rewards_first_and_last"].items():
        print(f"{name:14} reward {first:.1%} → {last:.1%}")
    print(f"{time.perf_counter() - began:.0f} s")
    text = json.dumps({"machine": versions(), **result}, indent=1)
    if file:
        Path(file).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
