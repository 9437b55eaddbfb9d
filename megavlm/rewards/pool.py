"""Rewards computed in worker processes beside the sampling."""

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.base.errors import RunFailure, UserError
from megavlm.base.quoting import shortened
from megavlm.config.reward_section import RewardSettings
from megavlm.rewards.pool_thread import PoolThread
from megavlm.rewards.score import Score
from megavlm.rewards.tasks import Group, Task
from megavlm.rewards.worker_process import WorkerProcess, unusable

_LOADING = 300.0  # seconds in which a worker must have loaded all rewards; a file may import torch, or load a model
_MOST_BAD_STARTS = 3  # workers in a row that may end while they load the rewards

Result = tuple[Hashable, list[Score]]


def check_rewards(rewards: Sequence[RewardSettings]) -> None:
    """Loads all rewards in a worker, as a run would. Reward models are not looked at.

    Raises:
        UserError: a reward cannot be loaded. The message names the file, the line and the cause.
    """
    computed = _computed(rewards)
    if not computed:
        return
    message, end = WorkerProcess(computed).try_start(_LOADING)
    if message is None:
        listed = ", ".join(reward.key for reward in computed)
        raise UserError(
            f"the rewards {listed} cannot be loaded: their process {end}",
            f"the files are run once when they are loaded, which may take {_LOADING:g} s and must not end the process",
        )
    if "unusable" in message:
        raise unusable(computed, message)


@dataclass
class _Call:
    """What a worker is doing: the task, and when it began."""

    task: Task
    began: float

    @property
    def deadline(self) -> float:
        return self.began + self.task.limit


class RewardPool(PoolThread[Group, Result]):
    """Worker processes that judge groups of answers. One for each data-parallel rank, on its leader.

    A thread deals the groups to the workers, so that these go on while the trainer samples or updates. A reward that
    takes too long has its worker killed and replaced. The workers end with the trainer, even if that is killed.

    Args:
        rewards: the rewards; models are left out, because the training ranks run them.
        workers: number of processes.
    """

    def __init__(self, rewards: Sequence[RewardSettings], workers: int = 2):
        super().__init__("rewards")
        self._rewards = _computed(rewards)
        self._num_workers = workers if self._rewards else 0
        self._waiting: deque[Task] = deque()
        self._workers: dict[WorkerProcess, _Call | None] = {}
        self._bad_starts, self._pending = 0, 0
        self._counting = threading.Lock()  # of groups, which may be submitted and taken by different threads
        self._thread.start()

    @property
    def pending(self) -> int:
        """Number of groups that were submitted and not yet returned."""
        return self._pending

    def submit(self, key: Hashable, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Takes a group without waiting.

        Args:
            key: names the group in the results.
            completions: its answers.
            columns: for each name as many values as there are answers (`score.columns_of`).
        """
        bad = {name: len(column) for name, column in columns.items() if len(column) != len(completions)}
        assert not bad, f"{len(completions)} completions, but columns of other lengths: {bad}"
        cause = None
        try:
            payload = pickle.dumps((list(completions), {name: list(column) for name, column in columns.items()}))
        except Exception as error:  # whatever an object's own __reduce__ raises
            payload, cause = b"", f"the record cannot be sent to a worker: {type(error).__name__}: {shortened(error)}"
        group = Group(key, len(completions), payload)
        group.tasks = [Task(group, number, reward.seconds) for number, reward in enumerate(self._rewards)]
        for task in group.tasks:
            if cause is not None or not completions:
                task.give_up(cause or "")
        with self._counting:
            self._pending += 1
        self._submit(group)

    def results(self, timeout: float = 0.0) -> list[Result]:
        """The groups that are finished and were not returned before: (key, score of each answer), in any order.

        Args:
            timeout: seconds to wait for the first of them; [] if none is finished by then.

        Raises:
            RunFailure: workers end again and again before they have loaded the rewards.
        """
        found: list[Result] = []
        while self._pending:
            try:
                found.append(self._taken(0.0 if found else timeout))
            except queue.Empty:
                break
        return found

    def wait(self) -> list[Result]:
        """Waits for all groups that were submitted, and returns those not returned before. Raises as `results`."""
        return [self._taken(None) for _ in range(self._pending)]

    def _taken(self, timeout: float | None) -> Result:
        found = self._next(timeout)
        with self._counting:
            self._pending -= 1
        return found

    def _running(self) -> Iterable[WorkerProcess]:
        return self._workers

    def _round(self) -> None:
        self._deal()
        while len(self._workers) < self._num_workers:  # after those that were found dead, or nobody would be awaited
            self._workers[WorkerProcess(self._rewards)] = None
        self._listen()

    def _deal(self) -> None:
        """Gives each idle worker a task."""
        for worker, call in list(self._workers.items()):
            if call is not None or not worker.is_ready or not self._waiting:
                continue
            task = self._waiting.popleft()
            try:
                worker.call(task.reward, task.answers, task.group.payload)
            except OSError:  # it has died while it was idle: no answer is to blame
                self._replace(worker)
                self._waiting.appendleft(task)
            else:
                self._workers[worker] = _Call(task, time.monotonic())

    def _listen(self) -> None:
        """Waits until a group is submitted, a worker says something or dies, or the time of a call is up."""
        deadlines = [
            call.deadline if call else worker.started + _LOADING
            for worker, call in self._workers.items()
            if call or not worker.is_ready
        ]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready, groups = self._heard_from(self._workers, timeout)
        for group in groups:
            self._waiting.extend(task for task in group.tasks if not task.is_done)
            self._finish(group)
        for worker, call in list(self._workers.items()):
            if worker.connection in ready:
                try:
                    message = worker.receive()
                except (OSError, EOFError):
                    self._ended(worker, call, None)
                else:
                    self._heard(worker, call, message)
            elif worker.pidfd in ready:
                self._ended(worker, call, None)
            elif call is not None and time.monotonic() >= call.deadline:
                self._ended(worker, call, f"no result after {call.task.limit:.3g} s")
            elif call is None and not worker.is_ready and time.monotonic() >= worker.started + _LOADING:
                self._ended(worker, call, f"has not loaded the rewards after {_LOADING:g} s")

    def _heard(self, worker: WorkerProcess, call: _Call | None, message: dict[str, Any]) -> None:
        if "unusable" in message:
            raise unusable(self._rewards, message)
        self._bad_starts = 0
        if call is not None:
            self._workers[worker] = None
            seconds = time.monotonic() - call.began
            if "error" in message:
                call.task.failed(message["error"], seconds, has_ended=False)
            else:
                call.task.succeeded(message["values"], message["causes"], seconds)
            self._go_on(call.task)

    def _ended(self, worker: WorkerProcess, call: _Call | None, cause: str | None) -> None:
        """A worker has died, or must be killed for this cause."""
        end = self._replace(worker)
        if call is not None:
            seconds = time.monotonic() - call.began
            from_outside = cause is None and worker.was_killed
            call.task.failed(cause or f"its process {end}", seconds, has_ended=True, was_killed=from_outside)
            self._go_on(call.task)
        elif not worker.is_ready:
            self._bad_starts += 1
            if self._bad_starts == _MOST_BAD_STARTS:
                raise RunFailure(
                    f"{_MOST_BAD_STARTS} reward workers in a row have ended before they could begin; the last one "
                    f"{cause or end}",
                    "the kernel kills processes when the machine runs out of memory: lower reward_pool.workers",
                )

    def _replace(self, worker: WorkerProcess) -> str:
        """Kills a worker, for which `_round` starts another. Returns how it ended."""
        del self._workers[worker]
        return worker.kill()

    def _go_on(self, task: Task) -> None:
        if task.is_done:
            self._finish(task.group)
        else:
            self._waiting.appendleft(task)

    def _finish(self, group: Group) -> None:
        if group.is_done:
            self._finished.put((group.key, group.scores(self._rewards)))


def _computed(rewards: Sequence[RewardSettings]) -> list[RewardSettings]:
    return [reward for reward in rewards if reward.model is None]
