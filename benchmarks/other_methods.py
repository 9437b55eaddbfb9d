"""The mean reward of each other loss and advantage of reinforcement learning, at the beginning and at the end of a run.

    python -m benchmarks.other_methods --demo DIR --load CHECKPOINT [--json FILE]

As ``python -m megavlm.demo.rl --all``, but in one process, with half the questions in a step, and from any checkpoint
that often errs. The folder DIR has the model and the data of the demo.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.forked import command
from benchmarks.ranks import versions
from megavlm.demo.commands import CONFIGS, DEFAULT_OUT
from megavlm.demo.rl import AVERAGED, OTHER_SETTINGS, OTHER_STEPS, OTHERS, REQUIRED_REWARD_GAIN, rewards_at_ends

SETTINGS = ("rollout.prompts=16", "train.memory_check=false", "data.eval=null", *OTHER_SETTINGS)


def main() -> int:
    """Exit status: 0 if each has raised the mean reward by ten points, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_methods", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default=DEFAULT_OUT, help=f"the demo's folder (default: {DEFAULT_OUT})")
    parser.add_argument("--load", type=Path, required=True, help="the checkpoint that learns")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    os.environ |= {"MEGAVLM_DEMO": str(Path(args.demo).absolute()), "MEGAVLM_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    import megavlm.commands.train  # noqa: F401 (so that no fork has to)

    work = (args.work or Path(tempfile.mkdtemp(prefix="megavlm-others-"))).absolute()
    rewards: dict[str, list[float]] = {}
    for name, own in OTHERS.items():
        command("grpo", CONFIGS / "grpo.yaml", f"model.load={args.load.absolute()}", *SETTINGS, *own,
                f"train.steps={OTHER_STEPS}", f"output={work / name}")  # fmt: skip
        rewards[name] = [round(value, 4) for value in rewards_at_ends(work / name)]
        print(f"{name:10} mean reward of {AVERAGED} steps {rewards[name][0]:.1%} → {rewards[name][1]:.1%}", flush=True)
        if args.json:  # of those that have ended by now
            content = {
                "versions": versions(),
                "settings": {"steps": OTHER_STEPS, "all": SETTINGS, "of_a_method": OTHERS},
                "not_run": [other for other in OTHERS if other not in rewards],
                "rewards_first_and_last": rewards,
            }
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(last < first + REQUIRED_REWARD_GAIN for first, last in rewards.values()))


if __name__ == "__main__":
    sys.exit(main())
