"""Answers by servers of vLLM; see ``Engine``."""

import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.config.settings import Settings
from megavlm.platform import Groups
from megavlm.platform.collectives import all_gather_objects, broadcast_object, while_others_wait
from megavlm.rollout.engine import Answered, Prompt, Sampling
from megavlm.vllm.adapters import takes_adapters
from megavlm.vllm.asking import ask
from megavlm.vllm.client import Client
from megavlm.vllm.environment import check_environment, python_of
from megavlm.vllm.keeper import Keeper, keepers_of
from megavlm.vllm.kept import BUCKET, Kept

_SIGN = 1.0  # seconds between two signs of life while answers are awaited


class Weights(Protocol):
    """The weights of the model, whatever its layout; see ``megavlm.runtime.weight_stream``.

    Attributes:
        adapter: adapter_config.json of the adapters, if it has any.
    """

    adapter: dict[str, Any] | None

    def buckets(self, max_bytes: int, *, merged: bool) -> Generator[list[tuple[str, Tensor]]]:
        """Buckets of tensors under their Hugging Face names; empty ones on all ranks but 0. Call it on all ranks.

        ``merged``: whether adapters are merged into them.
        """

    def adapter_buckets(self, max_bytes: int) -> Generator[list[tuple[str, Tensor]]]:
        """The adapters under peft's names; otherwise as ``buckets``."""


class VllmEngine:
    """Servers of vLLM, which get the weights of the model; see ``Engine``. Create it on all ranks.

    Rank 0 starts the servers, watches them and sends the weights. Each leader asks all of them in turn, without any
    collective, so that ``generate`` may run in a thread while the model learns; ``sync`` pauses the servers for the
    time that sending takes. A server that is lost is started again with the current weights, and its prompts are asked
    again.

    vLLM gives one log-probability of each token. At temperature 1 (and 0) it is that of the model itself, so
    ``logprobs`` and ``policy_logprobs`` are exact, and ``sampled_logprobs`` are the same numbers, which know nothing of
    top_k, top_p and banned tokens. At any other temperature all three are those of the distribution that the token was
    drawn from: exactly ``sampled_logprobs``; ``policy_logprobs`` but for the filters and banned tokens, whose share the
    others get; and not ``logprobs``. ``routing`` is None.

    Args:
        settings: of the run, with ``rollout.engine`` vllm.
        groups: the ranks.
        weights: the weights of the model.
        folder: for the logs of the servers and the current weights; on rank 0.

    Attributes:
        sends_adapters: whether servers get adapters by themselves, instead of weights that they are merged into.

    Raises:
        UserError: on all ranks: a server does not start, is not there, or is not one for this run.
    """

    samples_apart = True

    def __init__(self, settings: Settings, groups: Groups, weights: Weights, folder: Path):
        self._settings, self._groups, self._weights, self._folder = settings, groups, weights, folder
        self._token, self._count = broadcast_object(secrets.token_hex(4), groups.world_host), 0
        self._keepers: Sequence[Keeper] = []
        self._base: Kept | None = None  # what adapters are for that servers apply
        self._kept: Kept | None = None
        self._turns = count(groups.dp_rank)  # leaders begin with different servers
        self._lock, self._clients, self._is_closed = threading.Lock(), set[Client](), False
        self.seconds_sync, self.bytes_sync = 0.0, 0
        self._check_hosts()
        self._urls, self.sends_adapters = while_others_wait(self._start, groups.world_host)

    def generate(self, prompts: Iterator[Prompt] | None, sampling: Sampling) -> Iterator[Answered]:
        """Answers prompts, on leaders; see ``Engine.generate``. An exception is raised on this rank alone."""
        if prompts is None:
            return
        rollout = self._settings.rollout
        clients = self._open_clients()
        is_main = threading.current_thread() is threading.main_thread()
        pending: dict[Future, Prompt] = {}
        room, problem, is_used_up = rollout.max_sequences, None, False
        threads = ThreadPoolExecutor(rollout.max_sequences, "vllm answers")
        try:
            while True:
                while not is_used_up and (room > 0 or not pending):
                    try:
                        prompt = next(prompts, None)
                        if prompt is not None:
                            self._check_length(prompt)
                    except Exception as error:
                        problem, prompt = error, None
                    if prompt is None:
                        is_used_up = True
                        break
                    room -= len(prompt.seeds)
                    client = clients[next(self._turns) % len(clients)]
                    future = threads.submit(ask, client, prompt, sampling, rollout.vllm, self._check, self._token)
                    pending[future] = prompt
                if not pending:
                    break
                if is_main:  # of another thread it would hide that the main one hangs
                    beat("asking vLLM")  # which must answer within rollout.vllm.request_minutes
                for future in wait(pending, _SIGN, FIRST_COMPLETED).done:
                    prompt = pending.pop(future)
                    room += len(prompt.seeds)
                    yield Answered(prompt, future.result())
        finally:
            self._close_clients(clients)
            threads.shutdown(cancel_futures=True)
        if problem is not None:
            raise problem

    def sync(self) -> None:
        """Sends the present weights to all servers; see ``Engine.sync``. ``generate`` may be running in a thread.

        The weights are first written to files, bucket by bucket, from which also a server that is lost later gets them.
        If all servers can apply the adapters, which alone are trained then, they get the other weights only once.

        Raises:
            UserError: on all ranks, if a server has failed, or has received other weights than were sent.
        """
        began, old = time.perf_counter(), self._kept
        self._count += 1
        version = f"{self._token}:{self._count}"
        problem: Exception | None = None
        num_bytes = 0
        if self.sends_adapters and self._base is None:
            self._base = Kept(version, self._folder / "weights-base")
            problem = self._write(self._base, self._weights.buckets(BUCKET, merged=False))
            num_bytes = self._base.num_bytes
        new = Kept(version, self._folder / f"weights-{self._count}", self._base, self._weights.adapter or {})
        gather = self._weights.adapter_buckets(BUCKET) if self._base else self._weights.buckets(BUCKET, merged=True)
        later = self._write(new, gather)
        problem = problem or later

        def send() -> None:
            if isinstance(problem, OSError):
                raise UserError(f"the weights for vLLM cannot be written to {self._folder}: {problem}")
            if problem is not None:
                raise problem
            for keeper in self._keepers:
                keeper.want(new)
            for keeper in self._keepers:
                while not keeper.wait(version, _SIGN):
                    beat("sending weights to vLLM")
            if old is not None:
                old.remove()

        try:
            while_others_wait(send, self._groups.world_host)
            if problem is not None:  # of this rank alone
                raise problem
        except BaseException:
            if self._is_first:
                new.remove()
            raise
        self._kept = new
        self.seconds_sync, self.bytes_sync = time.perf_counter() - began, num_bytes + new.num_bytes

    def close(self) -> None:
        """Ends ``generate`` wherever it runs, and the servers started here; deletes the weights kept for them."""
        self._is_closed = True
        self._close_clients(list(self._clients))
        for keeper in self._keepers:
            keeper.close()
        for kept in (self._kept, self._base):
            if kept is not None and self._is_first:  # which may still send them when another rank is done
                kept.remove()

    def _write(self, kept: Kept, buckets: Generator[list[tuple[str, Tensor]]]) -> Exception | None:
        """Gathers weights, which rank 0 writes; returns what has gone wrong there. Call it on all ranks."""
        with closing(buckets):  # which goes on to its end if rank 0 stops early
            try:
                kept.write(buckets) if self._is_first else deque(buckets, 0)
            except Exception as error:  # of whatever kind: the other ranks wait to hear of it
                deque(buckets, 0)  # also if it had not begun, which others have
                return error
        return None

    def _open_clients(self) -> list[Client]:
        """One for each server."""
        clients = [Client(url) for url in self._urls]
        with self._lock:
            self._clients.update(clients)
        if self._is_closed:
            self._close_clients(clients)
        return clients

    def _close_clients(self, clients: Sequence[Client]) -> None:
        """Ends their requests; those who wait for one get ``NotReady``."""
        for client in clients:
            client.close()
        with self._lock:
            self._clients.difference_update(clients)

    @property
    def _is_first(self) -> bool:
        return self._groups.world_host.rank() == 0

    def _start(self) -> tuple[list[str], bool]:
        """On rank 0: starts the servers. Returns their addresses, and whether all of them apply the adapters."""
        if not self._settings.rollout.vllm.url:
            check_environment(python_of(self._settings))
        for left in self._folder.glob("weights-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._keepers = keepers_of(self._settings, self._folder, self._token)
        try:
            for keeper in self._keepers:
                keeper.start()
            for keeper in self._keepers:
                while not keeper.wait(None, _SIGN):
                    beat("starting vLLM")
            takes = all(takes_adapters(keeper.lora, self._settings) for keeper in self._keepers)
        except BaseException:
            self.close()
            raise
        return [keeper.url for keeper in self._keepers], takes and self._weights.adapter is not None

    def _check_hosts(self) -> None:
        """Raises UserError if servers that are started here could not be reached by all ranks."""
        host = self._groups.world_host
        hosts = set(all_gather_objects(socket.gethostname(), host)) if host.size() > 1 else set()
        if len(hosts) > 1 and not self._settings.rollout.vllm.url:
            raise UserError(
                f"the ranks are on {len(hosts)} hosts, and those beside the first cannot reach servers that it starts",
                "start the servers by themselves (docs/vllm.md), and set rollout.vllm.url to their addresses",
            )

    def _check(self) -> None:
        """Raises what has gone wrong with a server, which rank 0 alone knows."""
        for keeper in self._keepers:
            if keeper.problem is not None:
                raise keeper.problem

    def _check_length(self, prompt: Prompt) -> None:
        length, most = len(prompt.sample.input_ids), self._settings.data.seq_length
        if length >= most:  # a longer answer ends there; those of conversations have less room than the longest
            raise UserError(
                f"{prompt.sample.source}: the prompt has {length} tokens, which leaves no room for an answer in "
                f"data.seq_length = {most}, for which vLLM was started",
                "raise data.seq_length",
            )
