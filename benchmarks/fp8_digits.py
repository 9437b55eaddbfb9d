"""Trains the demo's model in bf16 and in FP8 on Transformer Engine's own Python on a CPU, and compares what it reads.

FP8 is simulated (tests/te_cpu/fp8.py): formats, scales, blocks and modules are TE's, the kernels are not. Nothing here
says anything about speed. For each seed, all precisions train from the same random weights on the same rows, in one
process; two of the demo's stages and their numbers of steps are enough. More digits are held out than in the demo, so
that a point of accuracy is more than chance.

    PYTHONPATH=tests:. python -m benchmarks.fp8_digits --json docs/benchmarks/fp8_digits.json

TE must be installed, or its set of packages lie beside the clone (tests/te_cpu/packages.py).
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.forked import command
from benchmarks.paired import compared
from benchmarks.ranks import versions

PRECISIONS = {
    "bf16": ["train.precision=bf16"],
    "FP8 blockwise, decoder": ["train.precision=fp8", "train.fp8={recipe: blockwise}"],
    "FP8 tensorwise, decoder and tower": ["train.precision=fp8", "train.fp8={recipe: tensorwise, tower: true}"],
}
STAGES = {
    "stage1": "pretrain",
    "sft": "sft",
}  # of configs/demo; the others are not about single digits
ALLOWED_POINTS = 1.0  # of accuracy below bf16
HELDOUT = 720  # digits; 4,308 pictures of the others are left for training, of which 70 steps see fewer
HARNESS = ["parallel.tensor=1", "model.kernels=te", "train.memory_check=false"]
UNSEEN = [
    "data.eval=null",
    "eval.every=null",
    "eval.rows=null",
    "eval.best=null",
]  # no checkpoint is chosen by the held-out digits


def main() -> int:
    """Exit status: 0 if every FP8 model reads the held-out digits within a point of bf16's, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--steps", type=json.loads, default={}, help="steps of a stage, such as '{\"stage1\": 60}'")
    parser.add_argument("--seeds", type=int, default=2, help="of weights and order of the data (default: 2)")
    options = parser.parse_args()
    os.environ |= {"MEGAVLM_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    from te_cpu import packages

    if importlib.util.find_spec("transformer_engine") is None:
        sys.path.append(str(packages.unpacked(packages.ARCHIVE)))
    import te_cpu.preload  # noqa: F401 (TE, with answers in place of its extension's functions)
    import transformer_engine

    from megavlm.demo.commands import work_in

    out = work_in(options.out or Path(tempfile.mkdtemp(prefix="fp8-digits-")))
    if not (out / f"model{options.seeds - 1}").exists():  # else what is there goes on
        prepare(out, options.seeds)
    runs: list[dict] = []
    summary: dict[str, dict[str, float]] = {}
    for seed in range(options.seeds):
        for name in PRECISIONS:
            runs.append(trained(name, seed, out, options.steps))
            print(json.dumps(without_answers(runs[-1])), flush=True)
        right = {name: [run["right"] for run in runs if run["precision"] == name] for name in PRECISIONS}
        summary = {name: compared(right["bf16"], found) for name, found in right.items()}
        if options.json:  # of the seeds that have ended by now
            content = {
                "note": "FP8 simulated on a CPU (tests/te_cpu), not run on a GPU",
                "versions": {**versions(), "transformer-engine": transformer_engine.__version__},
                "settings": {"held_out_digits": HELDOUT, "all": [*HARNESS, *UNSEEN], "of_a_precision": PRECISIONS},
                "summary": summary,
                "runs": [without_answers(run) for run in runs],
            }
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary, indent=2))
    return int(any(found["points_below"] > ALLOWED_POINTS for found in summary.values()))


def prepare(out: Path, seeds: int) -> None:
    """Writes the data, and a folder of random weights for each seed."""
    from megavlm.demo.data import read_texts, write_data
    from megavlm.demo.model_folder import make_model_folder

    data = write_data(out / "data", num_heldout=HELDOUT)
    for seed in range(seeds):
        make_model_folder(out / f"model{seed}", corpus=read_texts(data), vocab_size=1024, seed=seed)


def trained(name: str, seed: int, out: Path, steps: dict[str, int]) -> dict:
    """Accuracy, which answers are ``right``, last losses, steps and seconds of one run."""
    from megavlm.demo.answers import expected_answers, read_answers

    began = time.perf_counter()
    model, folder = out / f"model{seed}", out / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    weights, last = model, {}
    for stage, verb in STAGES.items():
        wanted = [f"train.steps={steps[stage]}"] if stage in steps else []
        here = [f"model.hf={model}", f"model.load={weights}", f"train.seed={seed}", f"output={folder / stage}"]
        command(verb, f"configs/demo/{stage}.yaml", *HARNESS, *PRECISIONS[name], *wanted, *here, *UNSEEN)
        last[stage] = json.loads((folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        weights = folder / stage
    answers = [f"model.hf={model}", f"model.load={weights}", f"output={folder / 'answers'}", "parallel.tensor=1"]
    command("infer", "configs/demo/sft.yaml", *answers, "model.kernels=portable", "train.precision=fp32")
    expected = expected_answers(out / "data" / "heldout.jsonl")
    given = read_answers(folder / "answers" / "answers.jsonl", len(expected))
    right = [answer.strip() == wanted for answer, wanted in zip(given, expected, strict=True)]
    return {
        "precision": name,
        "seed": seed,
        "accuracy": statistics.fmean(right),
        "loss": {stage: found["loss"] for stage, found in last.items()},
        "steps": {stage: found["step"] for stage, found in last.items()},
        "seconds": round(time.perf_counter() - began),
        "right": right,
    }


def without_answers(run: dict) -> dict:
    return {key: value for key, value in run.items() if key != "right"}


if __name__ == "__main__":
    sys.exit(main())
