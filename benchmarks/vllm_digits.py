"""GRPO on real vLLM, sampled in turn and one batch ahead, beside the built-in engine: right answers and seconds.

    python -m benchmarks.vllm_digits [--demo DIR] [--steps N] [--work DIR] [--json FILE]

The folder DIR of ``make demo-rl`` has a model that often errs at handwritten digits, and questions. GRPO goes on from
it in one process; a server of vLLM beside it samples the answers. The built-in engine does the same for comparison.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.ranks import versions
from megavlm.demo.answers import accuracy_of
from megavlm.demo.commands import CONFIGS, DEFAULT_OUT, NPROC, run
from megavlm.demo.run import Demo

SETTINGS = ("rollout.prompts=16", "train.memory_check=false", "align.correction=token_truncate")
RUNS = {
    "built-in engine": (),
    "vLLM, in turn": ("rollout.engine=vllm",),
    "vLLM, one batch ahead": ("rollout.engine=vllm", "rollout.ahead=1"),
}
SKIPPED = 3  # steps at the beginning that are not timed
FIELDS = ("seconds_rollout", "seconds_update", "seconds_sync", "mismatch_kl")


def measure(demo: Demo, work: Path, steps: int) -> dict[str, dict]:
    """The results of each run, by name."""
    grpo, start, results = CONFIGS / "grpo.yaml", demo.out / "rl" / "weak", dict[str, dict]()
    for number, (name, settings) in enumerate(RUNS.items()):
        output, answers = work / f"run{number}", work / f"answers{number}"
        if not (output / "checkpoints" / f"step_{steps:08d}").is_dir():
            run("megavlm", "grpo", grpo, f"model.load={start}", f"train.steps={steps}", *SETTINGS, *settings,
                f"output={output}")  # fmt: skip
        if not (answers / "answers.jsonl").is_file():
            run("megavlm", "infer", grpo, f"model.load={output}", f"output={answers}", *NPROC)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        timed = lines[SKIPPED:]
        results[name] = {
            "right_after": round(accuracy_of(answers, demo.questions), 4),
            "seconds": round(statistics.median(line["seconds"] for line in timed), 3),
            **{field: round(statistics.median(line[field] for line in timed), 6) for field in FIELDS},
            "largest_staleness": max(line["staleness"] for line in lines),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default=DEFAULT_OUT, help=f"the folder of `make demo-rl` (default: {DEFAULT_OUT})")
    parser.add_argument("--steps", type=int, default=30, help="number of steps (default: 30)")
    parser.add_argument("--work", help="folder for the runs (default: a temporary one)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    work, file = (os.path.abspath(path) if path else None for path in (args.work, args.json))
    demo = Demo(Path(args.demo))
    before = accuracy_of(demo.out / "rl" / "before", demo.questions)
    with tempfile.TemporaryDirectory(prefix="megavlm-vllm-") as temporary:
        results = measure(demo, Path(work or temporary), args.steps)
    print(f"right answers before: {before:.1%}")
    for name, found in results.items():
        print(f"{name}: {found}")
    ratio = results["vLLM, in turn"]["seconds"] / results["vLLM, one batch ahead"]["seconds"]
    print(f"a step one batch ahead takes 1/{ratio:.2f} of the time in turn")
    if file:
        content = {"versions": versions(), "steps": args.steps, "right_before": round(before, 4), "runs": results}
        Path(file).write_text(json.dumps({**content, "in_turn_over_ahead": round(ratio, 3)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
