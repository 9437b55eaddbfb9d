"""The trainer's side of a worker of environments: what it is asked, and what it must not take too long for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megavlm.base.errors import UserError
from megavlm.config.environment_section import EnvironmentSettings
from megavlm.rewards.worker_process import WorkerProcess

LOADING = 300.0  # seconds in which a worker must have loaded the file
_MOST_TOGETHER = 256  # calls at a time in a worker whose methods are coroutines


@dataclass(eq=False)
class Episode:
    """A conversation with an environment.

    Attributes:
        number: its number in the pool.
        columns: pickled (columns of the record, folder of the data).
        answers: the answers to which it has replied.
        worker: the process in which its environment is; None: in none yet, or that one has ended.
        is_suspect: whether it was at work in a process that has ended, perhaps because of another one or for a reason
            from outside.
        was_killed: whether, at its present call, a process was killed in which it alone was at work.
    """

    number: int
    columns: tuple[Mapping[str, Any], str]
    answers: list[str] = field(default_factory=list)
    worker: "EnvironmentWorker | None" = None
    is_suspect: bool = False
    was_killed: bool = False


@dataclass(eq=False)
class Call:
    """A call that waits or is at work. ``answer`` None: the beginning; ``ends``: the end of the conversation."""

    episode: Episode
    answer: str | None
    ends: bool = False
    deadline: float = 0.0
    limit: float = 0.0


class EnvironmentWorker(WorkerProcess):
    """A worker; see ``environments.worker``.

    Attributes:
        together: whether it can work on many calls at the same time.
        calls: those at work, by the numbers of their conversations.
        episodes: the conversations whose environments are here.
    """

    def __init__(self, settings: EnvironmentSettings):
        self._start(
            "megavlm.environments.worker",
            {"file": str(settings.file), "name": settings.name, "options": settings.options},
        )
        self.together = False
        self.calls: dict[int, Call] = {}
        self.episodes: set[Episode] = set()

    @property
    def has_room(self) -> bool:
        """Whether it can take a further call."""
        suspects = any(call.episode.is_suspect for call in self.calls.values())
        return self.is_ready and not suspects and len(self.calls) < (_MOST_TOGETHER if self.together else 1)

    def ask(self, call: Call, payload: bytes) -> None:
        """Sends a call. Raises OSError if the worker is dead or stuck."""
        answer = None if call.ends else call.answer
        head = {"id": call.episode.number, "answer": answer, "limit": call.limit}
        self.connection.send_bytes(json.dumps(head).encode())
        self.connection.send_bytes(payload)


def check_environment(settings: EnvironmentSettings) -> None:
    """Loads the environment in a worker, as a run would. Without an environment, it does nothing.

    Raises:
        UserError: the file cannot be loaded, or what it has is no environment. The message names file and line.
    """
    if settings.python is None:
        return
    message, end = EnvironmentWorker(settings).try_start(LOADING)
    if message is None:
        raise UserError(
            f"the environment {settings.python} cannot be loaded: its process {end}",
            f"the file is run once when it is loaded, which may take {LOADING:g} s and must not end the process",
        )
    if "unusable" in message:
        raise unusable(message)


def unusable(message: dict[str, Any]) -> UserError:
    """The error for a worker's message that the environment cannot be loaded."""
    text, remedy = message["unusable"]
    return UserError(f"the environment cannot be loaded: {text}", remedy)
