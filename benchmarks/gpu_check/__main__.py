"""One command for a machine with one GPU or two: all checks, one table at the end, and a JSON file (docs/gpu.md).

Each check is a process with a time limit. If it fails or is stopped, the table has its error and what it had measured
until then, and the other checks still run.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check import WITHOUT_TE
from benchmarks.gpu_check.checks import CHECKS, Check, derived
from benchmarks.gpu_check.machine import Machine, described, environment, probe
from benchmarks.gpu_check.measure import read_records
from benchmarks.gpu_check.models import ROOT
from benchmarks.gpu_check.outcome import Outcome, show
from benchmarks.gpu_check.process import run_apart

RESULTS = ROOT / "docs" / "benchmarks" / "gpu_check.json"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 0 if nothing failed and every bound holds, otherwise 1."""
    args = _parser().parse_args(arguments)
    began = time.monotonic()
    machine = Machine(0, "no GPU") if args.cpu else probe()
    if not args.cpu and not machine.gpus:
        print("gpu-check needs an NVIDIA GPU, and torch finds none; --cpu tries its code with tiny shapes")
        return 1
    if not args.cpu and machine.problem:
        print(f"without Transformer Engine: {machine.problem}")
    end = began + 60 * args.minutes
    outcomes = {name: _run(name, CHECKS[name], machine, end, args.cpu) for name in args.only or CHECKS}
    found = {name: outcome.measures for name, outcome in outcomes.items()}
    if measures := derived(found):
        outcomes["comparison"] = Outcome("ok", 0.0, measures, {})
    show(outcomes, judged=not args.cpu)
    content = {
        "machine": described(cpu=args.cpu) | {"transformer engine": machine.problem or "works"},
        "seconds": round(time.monotonic() - began, 1),
        "checks": {name: outcome.as_json() for name, outcome in outcomes.items()},
    }
    file = args.json or (None if args.cpu else RESULTS)  # numbers of a CPU are no results
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {file}")
    print(f"{content['seconds']} s")
    failed = any(outcome.status in ("failed", "stopped") for outcome in outcomes.values())
    broken = not args.cpu and any(m.holds is False for o in outcomes.values() for m in o.measures)
    return int(failed or broken)


def _run(name: str, check: Check, machine: Machine, end: float, cpu: bool) -> Outcome:
    """Runs a check, unless it cannot run or there is no time left for it."""
    if not cpu and machine.gpus < check.gpus:
        return Outcome("skipped", 0.0, [], {}, f"needs {check.gpus} GPUs; there is {machine.gpus}")
    left = end - time.monotonic()
    if left < 20:
        return Outcome("skipped", 0.0, [], {}, "no time was left; --minutes gives more")
    limit = left if cpu else min(check.seconds, left)  # how slow a CPU is nobody knows
    print(f"{name}: {check.what} (at most {limit:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as folder:
        out = Path(folder) / "measures.jsonl"
        words = [sys.executable, "-m", "benchmarks.gpu_check.one", name, str(out), *(["--cpu"] if cpu else [])]
        environ = environment() | ({WITHOUT_TE: "1"} if machine.problem and not cpu else {})
        status, seconds, error = run_apart(words, limit, cwd=ROOT, environ=environ)
        measures, settings = read_records(out)
    return Outcome(status, seconds, measures, settings, error)


def _parser() -> argparse.ArgumentParser:
    checks = "\n".join(f"  {name:<14}{check.what}" for name, check in CHECKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Check and measure megavlm on one GPU or two, with random weights made on the spot.",
        epilog=f"checks:\n{checks}\n\nexample: python -m benchmarks.gpu_check --only speed transformers --minutes 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help="run only these checks")
    parser.add_argument("--minutes", type=float, default=8.0, help="no check runs after so many minutes (default: 8)")
    parser.add_argument("--json", type=Path, help="file for the results (default: docs/benchmarks/gpu_check.json)")
    parser.add_argument(
        "--cpu", action="store_true", help="try the code with tiny shapes on the CPU, without judging bounds"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
