"""The project's own GPU tests, as one measure."""

import importlib.util
import re
import subprocess
import sys

from benchmarks.gpu_check.measure import Measure, Recorder, Skipped
from benchmarks.gpu_check.models import ROOT


def kernels(record: Recorder, *, cpu: bool) -> None:
    """Runs tests/gpu with pytest. On a CPU those that need a GPU skip themselves."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    # without tests/conftest.py, which needs packages that a machine for this command may lack
    apart = ["-p", "no:cacheprovider", "--confcutdir", "tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-q", *apart, "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    record(Measure("tests that failed", counts.get("failed", 0) + counts.get("error", 0), most=0, note=last))
    if done.returncode not in (0, 1) or not counts:
        raise RuntimeError(f"pytest ended with status {done.returncode}: {last}")
