"""GRPO on real vLLM, sampled in turn and one batch ahead: right answers to held-out digits, with several seeds.

    python -m benchmarks.ahead_digits --demo DIR --load CHECKPOINT [--seeds 0 1 2] [--steps N] [--json FILE]

The folder DIR has the model and the data of the demo; CHECKPOINT is what learns, a model that often errs. The trainer
is one process, the server that samples is another; all runs have the same one. The seed decides the order of the
questions and the sampled answers. What a former call has left in ``--work`` is not run again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.forked import command
from benchmarks.paired import compared
from benchmarks.ranks import versions
from megavlm.demo.commands import CONFIGS, DEFAULT_OUT
from megavlm.vllm.keeper import free_ports

SETTINGS = (
    "rollout.prompts=16", "rollout.engine=vllm", "rollout.cache_gib=0.25", "align.correction=token_truncate",
    "train.memory_check=false", "data.eval=null",
)  # fmt: skip
LAST = 4  # steps at the end whose rewards are averaged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default=DEFAULT_OUT, help=f"the demo's folder (default: {DEFAULT_OUT})")
    parser.add_argument("--load", type=Path, required=True, help="the checkpoint that learns")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=30, help="number of steps (default: 30)")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate (default: 2e-4)")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    demo = Path(args.demo).absolute()
    os.environ |= {"MEGAVLM_DEMO": str(demo), "MEGAVLM_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    import megavlm.commands.infer
    import megavlm.commands.train  # noqa: F401 (so that no fork has to)

    settings = (str(CONFIGS / "grpo.yaml"), f"model.load={args.load.absolute()}", f"train.steps={args.steps}",
                f"train.lr={args.lr}", *SETTINGS)  # fmt: skip
    work = (args.work or Path(tempfile.mkdtemp(prefix="megavlm-ahead-"))).absolute()
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [sys.executable, "-m", "megavlm.vllm.serve", *settings, f"output={work / 'server'}", "--port", str(port)],
        start_new_session=True,
    )
    runs: list[dict] = []
    try:
        before = right_answers(demo, args.load.absolute(), work / "before")
        for seed in args.seeds:
            for ahead in (0, 1):
                output = work / f"ahead{ahead}-{seed}"
                if not (output / "checkpoints" / f"step_{args.steps:08d}").is_dir():
                    command("grpo", *settings, f"train.seed={seed}", f"rollout.ahead={ahead}", f"output={output}",
                            f"rollout.vllm.url=[http://127.0.0.1:{port}]")  # fmt: skip
                runs.append({"seed": seed, "ahead": ahead, **found_in(output)})
                runs[-1]["right"] = right_answers(demo, output, output.with_name(f"answers{ahead}-{seed}"))
                runs[-1]["accuracy"] = round(statistics.fmean(runs[-1]["right"]), 4)
                print({key: value for key, value in runs[-1].items() if key != "right"}, flush=True)
            content = {
                "versions": versions(),
                "settings": {"steps": args.steps, "lr": args.lr, "all": SETTINGS, "held_out_digits": len(before)},
                "right_before": round(statistics.fmean(before), 4),
                **{f"ahead_{ahead}": summary(runs, ahead) for ahead in (0, 1)},
                "runs": [{key: value for key, value in run.items() if key != "right"} for run in runs],
            }
            if args.json:  # of the seeds that have ended by now
                args.json.write_text(json.dumps(content, indent=1) + "\n")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    print(json.dumps(content, indent=1))


def summary(runs: list[dict], ahead: int) -> dict:
    """The mean accuracy of the runs, and what it lies below that of the runs in turn, of all seeds and of each.

    Two runs of a seed learn from the same questions in the same order, so the standard error of the seeds is that of
    the mean of their differences; that of ``compared`` is of the questions.
    """
    right = {value: [run["right"] for run in runs if run["ahead"] == value] for value in (0, ahead)}
    pairs = zip(right[0], right[ahead], strict=True)
    points = [100 * (statistics.fmean(in_turn) - statistics.fmean(own)) for in_turn, own in pairs]
    error = round(statistics.stdev(points) / len(points) ** 0.5, 2) if len(points) > 1 else None
    return compared(right[0], right[ahead]) | {
        "standard_error_of_seeds_in_points": error,
        "points_below_of_seeds": [round(value, 2) for value in points],
    }


def found_in(output: Path) -> dict[str, float]:
    """The mean reward of the last steps, the median seconds of a step, and how old the oldest answers were."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "last_rewards": round(statistics.fmean(line["reward"] for line in lines[-LAST:]), 4),
        "seconds_of_a_step": round(statistics.median(line["seconds"] for line in lines[1:]), 2),
        "largest_staleness": max(line["staleness"] for line in lines),
    }


def right_answers(demo: Path, load: Path, answers: Path) -> list[bool]:
    """Which held-out questions a checkpoint answers right, as the reward sees it: "8." is right, too."""
    from megavlm.demo.answers import expected_answers, read_answers
    from megavlm.rewards.texts import normalised

    if not (answers / "answers.jsonl").is_file():
        command("infer", CONFIGS / "grpo.yaml", f"model.load={load}", f"output={answers}")
    expected = expected_answers(demo / "data" / "heldout.jsonl")
    given = read_answers(answers / "answers.jsonl", len(expected))
    return [normalised(answer) == wanted for answer, wanted in zip(given, expected, strict=True)]


if __name__ == "__main__":
    main()
