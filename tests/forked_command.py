"""The command `megavlm …` in processes forked off the server of forkserver.py, rather than in new interpreters.

What a run does is the same: processes of its own, files in, files out, an exit status, and with `--nproc` a parent and
its workers. What an interpreter does before and after `megavlm.cli.main.main` is not seen; tests/cli/test_cli.py, and
some tests of tests/commands, start it for real.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from forkserver import ENVIRONMENT, forkserver

TIMEOUT_SECONDS = 300
STDIN = "FORKED_COMMAND_STDIN"  # the variable with the file that is the standard input


def run(arguments: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess:
    """`megavlm ARGUMENTS` here and in this environment, with this input; exit status and what it printed."""
    with tempfile.TemporaryDirectory(prefix="megavlm-command-") as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        (Path(folder) / "stdin").write_text(stdin)
        environment = os.environ | {STDIN: str(Path(folder) / "stdin")}
        process = forkserver().Process(target=_command, args=(list(arguments), environment, outputs))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if late := process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        out, err = (path.read_text() if path.exists() else "" for path in outputs)
    assert not late, f"no end after {TIMEOUT_SECONDS} s: {arguments}\n{out}{err}"
    return subprocess.CompletedProcess(["megavlm", *arguments], process.exitcode, out, err)


def _command(arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    from megavlm.cli import local_workers

    os.setpgid(0, 0)
    for target, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    local_workers.subprocess = SimpleNamespace(
        Popen=_Worker, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )  # of that module alone
    _main(arguments, environment | ENVIRONMENT)


def _main(arguments: list[str], environment: dict[str, str]) -> None:
    """In a new process: the command, as `python -m megavlm` runs it."""
    import torch

    from megavlm.cli.main import main

    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    sys.stdin = open(environment.get(STDIN) or os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.exit(main(arguments))


class _Worker:
    """What `megavlm.cli.local_workers` needs of a Popen: a worker that is forked."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], start_new_session: bool, stdin, stdout=None, stderr=None
    ):
        assert command[:3] == [sys.executable, "-m", "megavlm"]
        assert start_new_session
        assert stdin in (None, subprocess.DEVNULL)
        if stdin is not None:
            env = {name: value for name, value in env.items() if name != STDIN}
        log = None if stdout is None else stdout.fileno()
        assert stderr == (None if log is None else subprocess.STDOUT)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._work, args=(command[3:], env, log))
        sys.stdout.flush()
        sys.stderr.flush()
        self._process.start()
        self.pid = self._process.pid

    @staticmethod
    def _work(arguments: list[str], environment: dict[str, str], log: int | None) -> None:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if log is not None:
            os.dup2(log, 1)
            os.dup2(log, 2)
        _main(arguments, environment)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
