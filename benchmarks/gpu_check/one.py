"""Runs one check in this process: ``python -m benchmarks.gpu_check.one NAME FILE [--cpu]``, for `__main__`.

Example: ``python -m benchmarks.gpu_check.one parity parity.jsonl --cpu`` writes what it measures to parity.jsonl.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.measure import SKIPPED, Recorder, Skipped


def main(arguments: list[str] | None = None) -> int:
    """Runs the check; returns the exit status: 0, or ``SKIPPED``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.one",
        description="Run one check in this process and append its measures to a file.",
        epilog="example: python -m benchmarks.gpu_check.one parity parity.jsonl --cpu",
    )
    parser.add_argument("name", choices=CHECKS, help="the check")
    parser.add_argument("file", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(arguments)
    if args.cpu:
        os.environ["MEGAVLM_PLATFORM"] = "cpu"
    try:
        CHECKS[args.name].run(Recorder(args.file), cpu=args.cpu)
    except Skipped as reason:
        print(reason, file=sys.stderr)
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
