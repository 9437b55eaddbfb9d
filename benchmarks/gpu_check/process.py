"""Runs a command with a time limit, and ends all of its processes when the time is over."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check.measure import SKIPPED

ERROR_LINES = 12  # of what a failed check printed


def run_apart(words: list[str], limit: float, *, cwd: Path, environ: dict[str, str]) -> tuple[str, float, str]:
    """Runs a command in a process group of its own.

    Returns:
        "ok", "skipped", "failed" or "stopped"; its seconds; and, unless it is ok, the last lines that it printed.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(words, cwd=cwd, env=environ, stdout=printed, stderr=printed, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = time.monotonic() - began
        printed.seek(0)
        lines = [line for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    if code == 0:
        return "ok", seconds, ""
    if code == SKIPPED:
        return "skipped", seconds, lines[-1] if lines else ""
    text = "\n".join(lines[-ERROR_LINES:])
    if code is None:
        return "stopped", seconds, f"stopped after {seconds:.0f} s; it had printed:\n{text}"
    return "failed", seconds, text or f"exit status {code}"


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the command: ranks, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
