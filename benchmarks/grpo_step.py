"""Which share of a GRPO step is sampling and updating, with a model of 100 million decoder weights on one process.

    python -m benchmarks.grpo_step [--prompts N] [--steps N] [--json FILE]

The model and the photographs of 256 visual tokens are those of ``benchmarks.generate``, in float32. In each step, 4 (or
N) questions get eight answers of at most 32 tokens, which are judged by their length in two reward workers, and all
weights but the tower's are updated. The rest of a step is rewards that are awaited, and what has no field of its own in
metrics.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.generate import make
from benchmarks.ranks import versions

MIN_SHARE, PROMPTS, ANSWERS, TOKENS = 0.9, 4, 8, 32
FIELDS = ("seconds", "seconds_rollout", "seconds_update", "seconds_reward")


def measure(root: Path, prompts: int, steps: int) -> list[dict[str, float]]:
    """The seconds of each step."""
    folder, questions = make(root, prompts * steps)
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    config = {
        "model": {"hf": str(folder), "load": str(folder), "freeze": ["vision"]},
        "data": {"train": str(root / "questions.jsonl"), "seq_length": 1024},
        "train": {"steps": steps, "lr": 1e-6, "precision": "fp32", "warmup_steps": 0, "memory_check": False},
        "rollout": {"prompts": prompts, "group_size": ANSWERS, "max_new_tokens": TOKENS},
        "align": {"beta": 0},
        "reward": [{"name": "length", "limit": 40}],
        "log": {"wandb": {"mode": "off"}},
        "output": str(root / "run"),
    }
    (root / "grpo.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "megavlm", "grpo", str(root / "grpo.yaml")], check=True)
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in FIELDS} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"questions of a step (default: {PROMPTS})")
    parser.add_argument("--steps", type=int, default=2, help="number of steps (default: 2)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megavlm-grpo-") as root:
        lines = measure(Path(root), args.prompts, args.steps)
    shares = [(line["seconds_rollout"] + line["seconds_update"]) / line["seconds"] for line in lines]
    for line, share in zip(lines, shares, strict=True):
        print(
            f"{line['seconds']:.1f} s: sampling {line['seconds_rollout']:.1f}, update {line['seconds_update']:.1f}, "
            f"rewards {line['seconds_reward']:.2f}: {share:.2%}"
        )
    print(f"at least {MIN_SHARE:.0%} in every step: {min(shares) >= MIN_SHARE}")
    if args.json:
        content = {
            "versions": versions(), "prompts": args.prompts, "answers": ANSWERS, "tokens_of_an_answer": TOKENS,
            "steps": lines, "shares": shares,
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if min(shares) >= MIN_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
