"""`--nproc`: a stop signal reaches the parent and all ranks at once, and the parent gets no turn for a long time.

What it then passes on is no second request: the ranks finish what the first one has asked them for.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from test_cli import place, start, wait_for  # noqa: F401 (fixtures)

STEP = """
import atexit
from megavlm.base import stop_signals

def main(settings, **flags):
    atexit.register(end)
    with stop_signals.watched() as signals:
        signals.defer()  # as from the first step on
        open(f'ready{rank}', 'w').write(str(os.getpid()))
        while not signals.asked:
            time.sleep(0.01)
        open(f'asked{rank}', 'w').close()
        while not os.path.exists('step is over'):
            time.sleep(0.01)
    print(f'saved by rank {rank}')

def end():  # an interpreter takes its time to end
    open(f'ending{rank}', 'w').close()
    while not os.path.exists('may end'):
        time.sleep(0.01)
"""
LONG = 1.5  # seconds; signals that are more than one second apart are two requests


@pytest.mark.parametrize("until", ["asked", "ending"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_the_parent_passes_on_late_is_no_second_signal(start, until, number):  # noqa: F811
    process = start(STEP, "sft", "run.yaml", "--nproc", "2")
    wait_for("ready0", "ready1")
    time.sleep(0.1)  # until the numbers are written
    os.kill(process.pid, signal.SIGSTOP)  # it is starved
    for pid in [process.pid, *(int(Path(f"ready{rank}").read_text()) for rank in range(2))]:
        os.kill(pid, number)
    wait_for("asked0", "asked1")
    if until == "ending":
        Path("step is over").touch()
        wait_for("ending0", "ending1")
    time.sleep(LONG)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(LONG)
    assert process.poll() is None
    Path("step is over").touch()
    Path("may end").touch()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "saved by rank 0\n"), err
    assert "error" not in err


def test_insisting_ends_the_ranks_all_the_same(start):  # noqa: F811
    """The parent does it: SIGTERM to all of them twice, as by somebody who has lost patience."""
    process = start(STEP, "sft", "run.yaml", "--nproc", "2")
    wait_for("ready0", "ready1")
    time.sleep(0.1)
    pids = [process.pid, *(int(Path(f"ready{rank}").read_text()) for rank in range(2))]
    for pause in (LONG, 0):
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(pause)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.endswith("error: ended by a second SIGTERM; the steps since the newest checkpoint are lost\n")
