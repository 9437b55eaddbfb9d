"""Keeps servers of vLLM running, each with the current weights. Runs in threads of rank 0."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.vllm.client import Client, NotReady, Refused, TooSlow
from megavlm.vllm.environment import command
from megavlm.vllm.identity import check_identity
from megavlm.vllm.kept import Kept

_LOOK = 0.5  # seconds between two looks at a server
_ASK = 10.0  # seconds between two questions to a server, and within which one that starts must answer
_HANGS = 60.0  # seconds without an answer after which a server is lost; one that computes answers all the same
# Of the trainer alone: variables by which torchrun would make a server one of its ranks, and tuning of the training.
_OF_TRAINER = re.compile(
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|CUDA_DEVICE_MAX_CONNECTIONS|"
    "PYTORCH_(CUDA_)?ALLOC_CONF|OMP_NUM_THREADS"
)
_GOODBYE = 2.0  # seconds within which a server must take notice of the end of the run
_TRIES = 3  # how often in a row a server may be lost before it has got the weights


class Keeper(threading.Thread):
    """Starts a server, gives it the current weights, and does both again when it is lost.

    Args:
        settings: of the run.
        url: where the server is, or is to be.
        log: the file for what it prints; None: it was started elsewhere.
        devices: numbers of its GPUs; none: those that the trainer sees.
        run: the name of the run. A server that was started elsewhere is reserved for it.
    """

    def __init__(self, settings: Settings, url: str, log: Path | None, devices: Sequence[int] = (), run: str = ""):
        super().__init__(name=f"vllm {url}", daemon=True)
        self.url, self._settings, self._log, self._devices = url, settings, log, devices
        self._run = run if log is None else ""
        self._client = Client(url, self._run)
        self.problem: Exception | None = None
        self.version: str | None = None  # of the weights that the server has
        self.base: str | None = None  # of the weights to which it applies an adapter
        self.lora: dict | None = None  # what the server says of the adapters that it can apply
        self._is_known = False  # whether the server has said what it is, and is ours
        self._has_started = False  # whether it has ever come up, so that the settings are right
        self._idle = 0.0  # seconds since another run, for which the server is reserved, has asked it
        self._wanted: Kept | None = None
        self._process: subprocess.Popen | None = None
        self._wake, self._closing, self._changed = threading.Event(), threading.Event(), threading.Condition()

    def want(self, weights: Kept) -> None:
        """From now on the server is to have these weights."""
        self._wanted = weights
        self._wake.set()

    def wait(self, version: str | None, seconds: float) -> bool:
        """Waits until the server has the weights of a version (None: until it answers), or has failed.

        Raises:
            Exception: what has gone wrong.
        """
        there = lambda: self.problem is not None or (self._is_known if version is None else self.version == version)
        with self._changed:
            done = self._changed.wait_for(there, seconds)
        if self.problem is not None:
            raise self.problem
        return done

    def close(self) -> None:
        """Ends the server if it was started here, otherwise leaves it to others."""
        self._closing.set()
        self._wake.set()
        self._client.close()  # so that the thread waits for no answer
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """The thread: makes what is wanted so, until it is closed."""
        lost, asked = 0, 0.0
        try:
            while not self._closing.is_set():
                try:
                    if not self._is_running():
                        self._start()
                    if time.monotonic() > asked + _ASK:
                        self._look(_HANGS)
                        asked = time.monotonic()
                    if self._wanted is not None and self.version != self._wanted.version:
                        self._send(self._wanted)
                    lost = 0
                except (NotReady, TooSlow) as error:
                    lost += 1
                    self._forget()
                    if lost == _TRIES:
                        text = f"the server of vLLM at {self.url} was lost {lost} times in a row: {error}"
                        raise UserError(text, self._hint()) from None
                self._wake.wait(_LOOK)
                self._wake.clear()
        except Exception as error:
            self._note(problem=error)
        finally:
            self._end()
            if self._run:  # the server knows whether it was this run that had it
                with suppress(NotReady, TooSlow, Refused):
                    Client(self.url, self._run).post("/release", {}, _GOODBYE)

    def _is_running(self) -> bool:
        if self._log is None:
            return self._is_known
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        """Starts the server, and waits until it answers. One that was started elsewhere is only awaited."""
        self._end()
        self._note(version=None, base=None, is_known=False)
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            port = int(self.url.rpartition(":")[2])
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command(self._settings, port, parent=os.getpid()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # with the processes that it starts it can be ended as one group
                    cwd=self._log.parent,
                    env=self._environment(),
                )
        end = time.monotonic() + 60 * self._settings.rollout.vllm.start_minutes
        while not self._closing.is_set():
            if self._process is not None and self._process.poll() is not None:
                status = self._process.returncode
                text = f"has ended with status {status}:{self._last_words()}"
                if self._has_started or status < 0:  # killed, or it can start and did not this time
                    raise NotReady(f"it {text}")
                raise UserError(f"the server of vLLM {text}", self._hint())
            try:
                self._look(_ASK)
            except (NotReady, TooSlow) as error:
                if time.monotonic() > end:
                    minutes = self._settings.rollout.vllm.start_minutes
                    raise UserError(
                        f"there is no server of vLLM at {self.url}: for rollout.vllm.start_minutes = {minutes:g} it "
                        f"has not answered ({error})",
                        self._hint(),
                    ) from None
            if self._is_known:
                self._has_started = True
                return
            self._closing.wait(_LOOK)

    def _look(self, seconds: float) -> None:
        """Asks the server what it is, and waits that long for the answer.

        While it is reserved for another run, it stays unknown. If that run has ended without a word, this passes.
        """
        try:
            told = self._client.get("/identity", seconds)
        except Refused as error:
            raise UserError(f"what answers at {self.url} is no server of vLLM that megavlm has started: {error}",
                            "start it as docs/vllm.md says") from None  # fmt: skip
        check_identity(told, self._settings, self.url)
        self.lora = told.get("lora")
        if self._log is not None:  # its process tells whether it was started again, and nobody else uses it
            self._note(is_known=True)
            return
        if told["run"] != self._run and not self._is_known:
            if told["run_seconds"] < self._idle:
                raise UserError(f"the server of vLLM at {self.url} is working for another run",
                                "give each run servers of its own, or wait for the end of the other one")  # fmt: skip
            self._idle = told["run_seconds"]
            return
        if self.version is not None and told["weights"] not in (self.version, None):
            raise UserError(f"the server of vLLM at {self.url} has got the weights of another run",
                            "give each run servers of its own")  # fmt: skip
        if told["weights"] is None:  # it was started again
            self._note(version=None, base=None)
        self._note(is_known=True)

    def _send(self, weights: Kept) -> None:
        rollout = self._settings.rollout
        self._note(version=None)
        try:
            base = weights.base.version if weights.base is not None else None
            has_base = base is not None and base == self.base
            weights.send(self._client, rollout.partial, 60 * rollout.vllm.request_minutes, has_base=has_base)
        except Refused as error:
            text = f"the server of vLLM at {self.url} has refused the weights: {error}"
            raise UserError(text, self._hint()) from None
        self._note(version=weights.version, base=base)

    def _forget(self) -> None:
        """The server is lost: what is left of it ends, and it will be started again."""
        self._end()
        self._note(version=None, base=None, is_known=False)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _environment(self) -> dict[str, str]:
        """The variables of the server."""
        kept = {name: value for name, value in os.environ.items() if not _OF_TRAINER.fullmatch(name)}
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self._devices))} if self._devices else {}
        return {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **devices}

    def _note(self, **values: object) -> None:
        """Changes attributes and tells those who wait."""
        with self._changed:
            for name, value in values.items():
                setattr(self, "_is_known" if name == "is_known" else name, value)
            self._changed.notify_all()

    def _hint(self) -> str:
        return f"see {self._log}" if self._log is not None else "see what that server has printed"

    def _last_words(self) -> str:
        """The last lines of the log that name an error."""
        assert self._log is not None
        with suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-400:]
            found = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
            return "".join(f"\n    {line[-400:]}" for line in list(dict.fromkeys(found))[-6:])
        return ""


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens at present."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def keepers_of(settings: Settings, folder: Path, run: str) -> Sequence[Keeper]:
    """One keeper for each server of the settings; their logs lie in ``folder``. ``run`` is the name of the run."""
    vllm = settings.rollout.vllm
    if vllm.url:
        return [Keeper(settings, url.rstrip("/"), None, run=run) for url in vllm.url]
    each = vllm.tensor_parallel
    return [
        Keeper(
            settings,
            f"http://127.0.0.1:{port}",
            folder / f"server{number}.log",
            vllm.devices[number * each : (number + 1) * each],
        )
        for number, port in enumerate(free_ports(vllm.servers))
    ]
