"""`--nproc N`: N worker processes on this machine, each with its place in the process group in its environment.

torchrun is not used for this because it cannot keep three promises of the command line: it turns every exit status
into 1 with a banner, ends workers 30 seconds after SIGTERM even while they write a checkpoint, and drops SIGUSR1.

Rank 0 has the terminal; what the others print goes to a log whose end is shown if that rank is the one that fails.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megavlm.cli import failures

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a checkpoint is written, then the run ends with status 0
_LOG_LINES = 40


def run(arguments: Sequence[str], nproc: int) -> int:
    """Runs `megavlm ARGUMENTS` in `nproc` processes and waits for them.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach the workers as a wish to stop; a second Ctrl-C ends them.

    Returns:
        0 when all ended well; 2 after bad settings or data, with one message printed; otherwise 1.
    """
    with tempfile.TemporaryDirectory(prefix="megavlm-") as name, _stop_signals() as stop:
        folder = Path(name)
        port = _free_port()
        workers = [_start(arguments, rank, nproc, port, folder) for rank in range(nproc)]
        try:
            return _wait(workers, folder, stop)
        finally:
            _end(workers)


def is_worker() -> bool:
    """Whether this process was started by `run`."""
    return failures.FOLDER_VARIABLE in os.environ


class _Stop:
    """Signals received: the ones to pass on, and whether to end at once."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.asked = False
        self.now = False

    def __call__(self, number: int, frame: object) -> None:
        self.now = self.now or (number == signal.SIGINT and self.asked)
        if number == signal.SIGINT and not self.asked:
            print("stopping after this step (Ctrl-C again: at once)", file=sys.stderr)
        self.asked = True
        self.pending.append(number if number in STOP_SIGNALS else signal.SIGTERM)


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    handled = (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int, folder: Path) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        failures.FOLDER_VARIABLE: str(folder),
    }
    command = [sys.executable, "-m", "megavlm", *arguments]
    # A session of its own: a Ctrl-C reaches the parent alone, and _end finds the data workers too.
    options = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    if rank == 0:
        return subprocess.Popen(command, **options)
    with _log(folder, rank).open("wb") as log:
        return subprocess.Popen(command, **options, stdout=log, stderr=subprocess.STDOUT)


def _wait(workers: list[subprocess.Popen], folder: Path, stop: _Stop) -> int:
    while True:
        while stop.pending:
            number = stop.pending.pop(0)
            for worker in workers:
                worker.send_signal(number)  # does nothing where the worker has ended
        if stop.now:
            failures.show("ended by Ctrl-C, without a checkpoint of the last steps")
            return failures.OTHER_ERROR
        failure = failures.first(folder)
        codes = [worker.poll() for worker in workers]
        broken = next((rank for rank, code in enumerate(codes) if code), None)
        # A worker that vanished comes first: failures of its peers are mere consequences.
        if broken is not None and not (failure and failure.rank == broken):
            return _vanished(broken, codes[broken], folder, stop)
        if failure:
            title = "" if failure.status == failures.USER_ERROR else f"rank {failure.rank} failed:\n"
            failures.show(title + failure.message, failure.remedy)
            return failure.status
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _vanished(rank: int, code: int, folder: Path, stop: _Stop) -> int:
    """Tells of a worker that ended without a word of its own, such as one killed for its memory."""
    if code == failures.USER_ERROR:
        return code
    if code < 0 and stop.asked and -code in STOP_SIGNALS:
        failures.show("stopped before the first step; nothing was saved")
        return failures.OTHER_ERROR
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    hint = "the kernel does that to a process that takes too much memory" if code == -signal.SIGKILL else None
    tail = "\n".join(_log(folder, rank).read_text(errors="replace").splitlines()[-_LOG_LINES:]) if rank else ""
    failures.show(f"rank {rank} {how}" + (f"; the end of its output:\n{tail}" if tail else ""), hint)
    return failures.OTHER_ERROR


def _end(workers: list[subprocess.Popen]) -> None:
    """Ends whatever still runs: after a success nothing does."""
    if all(worker.poll() == 0 for worker in workers):
        return
    for worker in workers:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    for worker in workers:
        worker.wait()
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr)  # a killed progress display leaves the cursor hidden


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
