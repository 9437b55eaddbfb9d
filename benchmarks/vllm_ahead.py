"""Seconds of a GRPO step on real vLLM, sampled in turn and one batch ahead; trainer and server have a core each.

    python -m benchmarks.vllm_ahead [--demo DIR] [--load CHECKPOINT] [--steps N] [--json FILE]

The folder DIR of ``make demo-rl`` has the model and the questions. Sampling and learning take about as long as each
other: 256 answers of at most five tokens in a step, 32 at a time. ``make vllm`` sets vLLM up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.ranks import versions
from megavlm.demo.commands import CONFIGS, DEFAULT_OUT
from megavlm.vllm.keeper import free_ports

SETTINGS = (
    "rollout.prompts=32", "rollout.max_sequences=32", "rollout.max_new_tokens=5", "rollout.engine=vllm",
    "align.correction=token_truncate", "train.memory_check=false",
)  # fmt: skip
FIELDS = ("seconds", "seconds_rollout", "seconds_update", "seconds_sync", "staleness")


def measure(root: Path, load: str, steps: int) -> dict[str, list[dict[str, float]]]:
    """The fields of each step after the first, in turn and ahead."""
    settings = (str(CONFIGS / "grpo.yaml"), f"model.load={load}", f"train.steps={steps}", *SETTINGS)
    (port,) = free_ports(1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        ["taskset", "-c", "1", sys.executable, "-m", "megavlm.vllm.serve", *settings, f"output={root}",
         "--port", str(port)],
        env=environment, start_new_session=True,
    )  # fmt: skip
    found = {}
    try:
        for ahead in (0, 1):
            output = root / f"ahead{ahead}"
            subprocess.run(
                ["taskset", "-c", "0", sys.executable, "-m", "megavlm", "grpo", *settings, f"output={output}",
                 f"rollout.ahead={ahead}", f"rollout.vllm.url=[http://127.0.0.1:{port}]"],
                env=environment, check=True,
            )  # fmt: skip
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            found["ahead" if ahead else "in turn"] = [{name: line[name] for name in FIELDS} for line in lines[1:]]
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default=DEFAULT_OUT, help=f"the folder of `make demo-rl` (default: {DEFAULT_OUT})")
    parser.add_argument("--load", help="what learns (default: DIR/rl/weak)")
    parser.add_argument("--steps", type=int, default=8, help="number of steps (default: 8)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    os.environ["MEGAVLM_DEMO"] = str(Path(args.demo).absolute())
    with tempfile.TemporaryDirectory(prefix="megavlm-ahead-") as root:
        found = measure(Path(root), args.load or str(Path(args.demo) / "rl" / "weak"), args.steps)
    median = {name: statistics.median(step["seconds"] for step in steps) for name, steps in found.items()}
    ratio = median["in turn"] / median["ahead"]
    print(f"median of a step: {median}; in turn over ahead: {ratio:.2f}")
    if args.json:
        content = {"versions": versions(), "median_seconds": median, "in_turn_over_ahead": round(ratio, 3), **found}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
