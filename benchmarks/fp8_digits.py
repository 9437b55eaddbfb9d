"""Trains the demo's model in bf16 and in FP8 on Transformer Engine's own Python on a CPU, and compares what it reads.

FP8 is simulated (tests/te_cpu/fp8.py): formats, scales, blocks and modules are TE's, the kernels are not. Nothing here
says anything about speed. Each precision trains from the same random weights on the same rows, in one process.

    PYTHONPATH=tests:. python -m benchmarks.fp8_digits --json docs/benchmarks/fp8_digits.json

TE must be installed, or its set of packages lie beside the clone (tests/te_cpu/packages.py).
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

PRECISIONS = {
    "bf16": ["train.precision=bf16"],
    "FP8 blockwise, decoder": ["train.precision=fp8", "train.fp8={recipe: blockwise}"],
    "FP8 tensorwise, decoder and tower": ["train.precision=fp8", "train.fp8={recipe: tensorwise, tower: true}"],
}
STAGES = {
    "stage1": "pretrain",
    "sft": "sft",
}  # of configs/demo; the others are not about single digits
ALLOWED = 0.01  # of accuracy below bf16
HARNESS = ["parallel.tensor=1", "model.kernels=te", "train.memory_check=false"]
FORK = multiprocessing.get_context("fork")  # what is started has TE and its answers already


def main() -> int:
    """Exit status: 0 if every FP8 model reads the held-out digits within a point of bf16's, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--steps", type=json.loads, default={}, help="steps of a stage, such as '{\"stage1\": 60}'")
    parser.add_argument("--only", action="append", choices=PRECISIONS, help="this precision; may be repeated")
    options = parser.parse_args()
    os.environ |= {"MEGAVLM_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    from te_cpu import packages

    if importlib.util.find_spec("transformer_engine") is None:
        sys.path.append(str(packages.unpacked(packages.ARCHIVE)))
    import te_cpu.preload  # noqa: F401 (TE, with answers in place of its extension's functions)

    from megavlm.demo.run import Demo

    demo = Demo(options.out or Path(tempfile.mkdtemp(prefix="fp8-digits-")))
    if not (demo.out / "model").exists():
        demo.prepare(overwrite=False)
    results = []
    for name in options.only or PRECISIONS:
        results.append(trained(name, demo, options.steps))
        print(json.dumps(results[-1]), flush=True)
        if options.json:  # what has ended by now
            note = "FP8 simulated on a CPU (tests/te_cpu), not run on a GPU; accuracy on 360 held-out digits"
            options.json.write_text(json.dumps({"note": note, "results": results}, indent=2) + "\n")
    accuracy = {result["precision"]: result["accuracy"] for result in results}
    return int(any(value < accuracy.get("bf16", 0) - ALLOWED for value in accuracy.values()))


def trained(name: str, demo, steps: dict[str, int]) -> dict:
    """Accuracy, last losses, steps and seconds of one precision."""
    from megavlm.demo.answers import accuracy_of

    began = time.perf_counter()
    folder, weights, last = demo.out / name.replace(",", "").replace(" ", "-"), demo.out / "model", {}
    for stage, verb in STAGES.items():
        wanted = [f"train.steps={steps[stage]}"] if stage in steps else []
        here = [f"model.load={weights}", f"output={folder / stage}"]
        command(verb, f"configs/demo/{stage}.yaml", *HARNESS, *PRECISIONS[name], *wanted, *here)
        weights = folder / stage
        last[stage] = json.loads((weights / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    answers = [f"model.load={weights}", f"output={folder / 'answers'}", "parallel.tensor=1"]
    command("infer", "configs/demo/sft.yaml", *answers, "model.kernels=portable", "train.precision=fp32")
    return {
        "precision": name,
        "accuracy": accuracy_of(folder / "answers", demo.questions),
        "loss": {stage: found["loss"] for stage, found in last.items()},
        "steps": {stage: found["step"] for stage, found in last.items()},
        "seconds": round(time.perf_counter() - began),
    }


def command(*arguments: object) -> None:
    """`megavlm ARGUMENTS` in a fork of this process. Ends the script if it fails."""
    process = FORK.Process(target=_command, args=([str(argument) for argument in arguments],))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"megavlm {' '.join(map(str, arguments))}: exit status {process.exitcode}")


def _command(arguments: list[str]) -> None:
    import torch

    from megavlm.cli.main import main as megavlm

    torch.set_num_threads(1)
    sys.exit(megavlm(arguments))


if __name__ == "__main__":
    sys.exit(main())
