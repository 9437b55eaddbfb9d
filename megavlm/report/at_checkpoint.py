"""loss.png and report.html while a run goes on, by a process of their own, so that they exist after a crash.

The process is a new interpreter, which shares nothing with the trainer: no memory, no GPU, no locks. It does not import
torch unless sampled answers have pictures, has a low priority and ends with the trainer.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from megavlm.base.processes import end_with_parent
from megavlm.report.loss_plot import write_loss_plot
from megavlm.report.run_report import write_report

PAUSE = 30.0  # seconds from a report to the next one
_GRACE = 2.0  # seconds from the reason for a report to it: a run that has ended by then writes the report itself
_PATIENCE = 60.0  # seconds for a report that is being written when the run ends
_NICE = 10


class ReportAtCheckpoint:
    """Writes the report of a run in the background: the first one soon after a reason for it, the next with a pause.

    Reasons are a checkpoint and sampled answers that were logged.

    The checkpoint with which a run ends starts no process, unless that end takes longer than ``_GRACE``. A report that
    fails is not told: the one at the end tells.

    Args:
        output: the run's folder.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._due, self._ended = threading.Event(), threading.Event()
        # The thread lives as long as the run: the kernel ends a child when the thread that has started it ends.
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def due(self) -> None:
        """Says that there is something new to show, such as a checkpoint; returns at once."""
        self._due.set()

    def close(self) -> None:
        """Waits for a report that is being written; the last one is up to the caller."""
        self._ended.set()
        self._due.set()
        self._thread.join()

    def _work(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            self._due.wait()
            if self._ended.wait(_GRACE):
                return
            self._due.clear()
            self._write()
            pause = PAUSE

    def _write(self) -> None:
        arguments = [sys.executable, "-m", __name__, str(self._output), str(os.getpid())]
        try:
            silent = subprocess.DEVNULL
            child = subprocess.Popen(arguments, stdin=silent, stdout=silent, stderr=silent)
        except OSError:  # no memory or no process left: the run matters more
            return
        deadline = None
        while child.poll() is None:
            time.sleep(0.1)
            if self._ended.is_set():
                deadline = deadline or time.monotonic() + _PATIENCE
                if time.monotonic() > deadline:
                    child.kill()


def main() -> None:
    """The process: writes the report of the folder that its first argument names. The second is the trainer's id."""
    folder, trainer = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent(trainer)
    os.nice(_NICE)
    write_loss_plot(folder)
    write_report(folder)


if __name__ == "__main__":
    main()
