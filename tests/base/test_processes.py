"""No child process outlives the one that started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import os, subprocess, sys
child = "from megavlm.base.processes import end_with_parent; end_with_parent(); print('on', flush=True); input()"
process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_child_ends_with_a_killed_parent():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    child, until = int(done.stdout), time.monotonic() + 30
    while _is_running(child):
        assert time.monotonic() < until, f"process {child} has outlived its parent"
        time.sleep(0.05)


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    code = f"from megavlm.base.processes import end_with_parent; end_with_parent({os.getpid() + 1})"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
