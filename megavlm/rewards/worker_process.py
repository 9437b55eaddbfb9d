"""The trainer's side of a reward worker: an interpreter of its own, which can be killed at any moment."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.processes import stop_signals_held
from megavlm.config.reward_section import RewardSettings

# A fork of the trainer would hold copies of its memory, and multiprocessing's "spawn" would import its main module.
_CODE = (
    "import json, sys; sys.path = json.loads(sys.argv[3]); from {} import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_STUCK = 10.0  # seconds after which a message that is cut off, or cannot be sent, counts as a dead worker


class WorkerProcess:
    """A running worker. The thread that starts it must live on: the worker ends with that thread.

    Attributes:
        started: the time (``time.monotonic``) at which it was started.
        is_ready: whether it has loaded all rewards; `receive` updates it.
        pidfd: becomes readable when the process ends.
    """

    def __init__(self, rewards: Sequence[RewardSettings]):
        self._start("megavlm.rewards.worker", [
            {
                "name": reward.name,
                "options": reward.options,
                "file": str(reward.file) if reward.file else None,
                "function": reward.function,
            }
            for reward in rewards
        ])  # fmt: skip

    def _start(self, module: str, first: Any) -> None:
        """Starts the process, which runs ``main`` of a module and gets the first message as JSON."""
        ours, theirs = socket.socketpair()
        for side in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, side, struct.pack("ll", int(_STUCK), 0))
        with theirs, stop_signals_held():
            arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(module), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # so that what a reward starts is killed with it
            )
        self.pidfd = os.pidfd_open(self._process.pid)
        self.connection = Connection(ours.detach())
        self.started, self.is_ready = time.monotonic(), False
        self.connection.send_bytes(json.dumps(first).encode())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def was_killed(self) -> bool:
        """Of a process that has ended: whether SIGKILL has ended it, which may have come from outside."""
        return self._process.returncode == -signal.SIGKILL

    def call(self, reward: int, answers: Sequence[int] | None, payload: bytes) -> None:
        """Asks for the values of a reward. Raises OSError if the worker is dead or stuck.

        Args:
            reward: the number of the reward.
            answers: the numbers of the answers to be judged; None: all.
            payload: pickled (completions, columns) of all answers.
        """
        self.connection.send_bytes(json.dumps({"reward": reward, "answers": answers}).encode())
        self.connection.send_bytes(payload)

    def receive(self) -> dict[str, Any]:
        """The next message (see `worker`). Raises OSError or EOFError if the worker is dead or stuck."""
        message = json.loads(self.connection.recv_bytes())
        self.is_ready = self.is_ready or "ready" in message
        return message

    def try_start(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """Waits for its first message and ends it. Returns the message, None if there is none, and how it ended."""
        message = None
        try:
            if wait([self.connection, self.pidfd], seconds):
                message = self.receive()
        except (OSError, EOFError):
            pass  # it died
        return message, self.kill()

    def kill(self) -> str:
        """Ends the process and those that it has started. Returns how it ended, for example "killed by SIGSEGV"."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # one that has already ended keeps its status
        status = self._process.wait()
        self.connection.close()
        os.close(self.pidfd)
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def unusable(rewards: Sequence[RewardSettings], message: dict[str, Any]) -> UserError:
    """The error for a worker's message that a reward cannot be loaded."""
    text, remedy = message["unusable"]
    return UserError(f"the reward {rewards[message['reward']].key} cannot be loaded: {text}", remedy)
