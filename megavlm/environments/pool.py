"""Environments in worker processes beside the sampling: each conversation has one of its own."""

import pickle
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.base.errors import RunFailure
from megavlm.base.quoting import shortened
from megavlm.config.environment_section import EnvironmentSettings
from megavlm.environments.step import Observation
from megavlm.environments.worker_process import LOADING, Call, EnvironmentWorker, Episode, unusable
from megavlm.rewards.pool_thread import PoolThread

_MOST_BAD_STARTS = 3  # workers in a row that may end while they load the file
_GRACE = 5.0  # seconds after its limit in which such a worker ends a call by itself


@dataclass(frozen=True)
class Reply:
    """What an environment has answered; without a cause, it has not failed."""

    observation: Observation
    cause: str | None
    seconds: float


class EnvironmentPool(PoolThread[Call, tuple[Episode, Reply]]):
    """Worker processes for the conversations of a data-parallel rank, on its leader.

    A thread deals the calls to the workers. An environment stays in the process in which it began. If that ends, by its
    own fault or because a call took too long, the others in it begin anew in another one: reset, and then the answers
    that they have had. Of several calls that were at work in it, each is tried again alone. So is one that was alone
    with a process that was killed: the reason may have come from outside, such as another process that takes all
    memory. If that happens twice, the environment is to blame.

    Args:
        settings: the section ``environment``, with a file.
    """

    def __init__(self, settings: EnvironmentSettings):
        super().__init__("environments")
        self._settings = settings
        self._waiting: deque[Call] = deque()
        self._workers: list[EnvironmentWorker] = []
        self._bad_starts, self._pending, self._numbers = 0, 0, 0
        self._thread.start()

    def begin(self, columns: Mapping[str, Any], folder: str) -> Episode:
        """Makes an environment and calls its ``reset`` without waiting.

        Args:
            columns: the arguments of reset, as far as it has parameters for them.
            folder: the folder from which the paths of its pictures start.
        """
        self._numbers += 1
        episode = Episode(self._numbers, (columns, folder))
        self._call(Call(episode, None))
        return episode

    def step(self, episode: Episode, answer: str) -> None:
        """Calls ``step`` of an environment without waiting."""
        self._call(Call(episode, answer))

    def end(self, episode: Episode) -> None:
        """Calls ``close`` of an environment, if it has one; there is no reply, and a failure is of no interest."""
        self._call(Call(episode, None, ends=True))

    def wait(self, sign: Callable[[], None] = lambda: None) -> dict[Episode, Reply]:
        """Waits for the replies to all calls since the last time.

        Args:
            sign: called about once a second meanwhile.

        Raises:
            UserError: the file cannot be loaded, or workers end again and again before they have loaded it.
        """
        found: dict[Episode, Reply] = {}
        while self._pending:
            try:
                episode, reply = self._next(timeout=1.0)
            except queue.Empty:
                sign()
                continue
            self._pending -= 1
            found[episode] = reply
        return found

    def _call(self, call: Call) -> None:
        self._pending += not call.ends
        self._submit(call)

    def _running(self) -> Iterable[EnvironmentWorker]:
        return self._workers

    def _round(self) -> None:
        self._deal()
        while len(self._workers) < self._settings.workers:  # after those that were found dead, as in the reward pool
            self._workers.append(EnvironmentWorker(self._settings))
        self._listen()

    def _deal(self) -> None:
        """Gives waiting calls to workers that can take them."""
        for call in list(self._waiting):
            worker = call.episode.worker or self._chosen()
            if worker is None or not worker.has_room or (call.episode.is_suspect and worker.calls):
                continue
            self._waiting.remove(call)
            self._begin(call, worker)

    def _chosen(self) -> EnvironmentWorker | None:
        """The worker with room that has the fewest conversations."""
        free = [worker for worker in self._workers if worker.has_room]
        return min(free, key=lambda worker: (len(worker.calls), len(worker.episodes)), default=None)

    def _begin(self, call: Call, worker: EnvironmentWorker) -> None:
        episode, payload, calls = call.episode, b"", 1
        if episode.worker is None:
            if call.ends:
                return
            try:
                payload = pickle.dumps((*episode.columns, episode.answers))
            except Exception as error:  # whatever an object's own __reduce__ raises
                cause = f"the record cannot be sent to a worker: {type(error).__name__}: {shortened(error)}"
                self._reply(call, Reply(Observation(), cause, 0.0))
                return
            calls += len(episode.answers)
        call.limit = calls * self._settings.timeout
        call.deadline = time.monotonic() + call.limit + _GRACE * worker.together
        episode.worker = worker
        worker.episodes.add(episode)
        worker.calls[episode.number] = call
        try:
            worker.ask(call, payload)
        except OSError:
            del worker.calls[episode.number]
            self._ended(worker, None)
            self._waiting.appendleft(call)

    def _listen(self) -> None:
        """Waits until something is submitted, a worker says something or dies, or the time of a call is up."""
        deadlines = [call.deadline for worker in self._workers for call in worker.calls.values()]
        deadlines += [worker.started + LOADING for worker in self._workers if not worker.is_ready]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready, calls = self._heard_from(self._workers, timeout)
        self._waiting.extend(calls)
        now = time.monotonic()
        for worker in list(self._workers):
            late = min(worker.calls.values(), key=lambda call: call.deadline, default=None)
            if worker.connection in ready:
                try:
                    self._heard(worker)
                except (OSError, EOFError):
                    self._ended(worker, None)
            elif worker.pidfd in ready:
                self._ended(worker, None)
            elif late is not None and now >= late.deadline:
                self._ended(worker, f"no result after {late.limit:.3g} s")
            elif not worker.is_ready and now >= worker.started + LOADING:
                self._ended(worker, f"has not loaded the environment after {LOADING:g} s")

    def _heard(self, worker: EnvironmentWorker) -> None:
        message = worker.receive()
        if "unusable" in message:
            raise unusable(message)
        worker.together, self._bad_starts = message["together"], 0
        if "ready" in message:
            return
        pictures = tuple(worker.connection.recv_bytes() for _ in range(message.get("pictures", 0)))
        call = worker.calls.pop(message["id"])
        call.episode.is_suspect = call.episode.was_killed = False
        if call.ends:
            worker.episodes.discard(call.episode)
            return
        if call.answer is not None:
            call.episode.answers.append(call.answer)
        said = Observation()
        if (cause := message.get("error")) is None:
            said = Observation(message["text"], pictures, message["reward"], message["done"])
        self._reply(call, Reply(said, cause, message["seconds"]))

    def _ended(self, worker: EnvironmentWorker, cause: str | None) -> None:
        """A worker has died, or must be killed for this cause."""
        self._workers.remove(worker)
        end = worker.kill()
        for episode in worker.episodes:
            episode.worker = None
        calls = [call for call in worker.calls.values() if not call.ends]
        from_outside = cause is None and worker.was_killed
        for call in calls:
            is_alone = len(calls) == 1
            if not is_alone or (from_outside and not call.episode.was_killed):
                call.episode.is_suspect, call.episode.was_killed = True, is_alone
                self._waiting.appendleft(call)
            else:
                call.episode.is_suspect = call.episode.was_killed = False
                self._reply(call, Reply(Observation(), cause or f"its process {end}", call.limit))
        if not worker.is_ready:
            self._bad_starts += 1
            if self._bad_starts == _MOST_BAD_STARTS:
                raise RunFailure(
                    f"{_MOST_BAD_STARTS} processes of environments in a row have ended before they could begin; the "
                    f"last one {cause or end}",
                    "the file is run once in each of them, and must not end it; the kernel kills processes when the "
                    "machine runs out of memory: lower environment.workers",
                )

    def _reply(self, call: Call, reply: Reply) -> None:
        self._finished.put((call.episode, reply))
