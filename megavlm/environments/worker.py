"""A worker of environments: a process in which many of them live, each with its own conversation.

It imports nothing that is slow to load. Methods that are coroutines run together, in a thread with an event loop; all
others run one after the other in the main thread. Messages, all over one connection:

    to the worker     JSON {"file", "name", "options"}, once; then for each call JSON {"id": conversation, "answer":
                      text or null, "limit": seconds} and a payload: empty, or for a conversation that is new here a
                      pickled (columns of the record, folder, answers to which it has replied elsewhere). An answer of
                      null with an empty payload ends the conversation.
    from the worker   JSON {"ready": true, "together": whether its methods are coroutines} or {"unusable": [message,
                      remedy]}, once; then for each call, in any order, {"id", "seconds", "together"} and either
                      {"text", "reward", "done", "pictures": count}, after which each picture follows, or {"error":
                      cause}
"""

import asyncio
import inspect
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.processes import end_with_parent, ignore_stop_signals
from megavlm.base.quoting import shortened
from megavlm.environments.step import Observation, checked
from megavlm.rewards.own_function import load_function


def main(handle: int, parent: int) -> None:
    """Runs until the trainer kills this process or ends itself.

    Args:
        handle: file descriptor of the connection to the trainer.
        parent: process id of the trainer.
    """
    end_with_parent(parent)
    ignore_stop_signals()
    connection = Connection(handle)
    setup = json.loads(connection.recv_bytes())
    try:
        make = loaded(setup["file"], setup["name"], setup["options"])
    except UserError as error:
        connection.send_bytes(json.dumps({"unusable": [error.message, error.remedy]}).encode())
        return
    worker = _Worker(connection, make, setup["options"])
    connection.send_bytes(json.dumps({"ready": True, "together": _is_async(make)}).encode())
    while True:
        try:
            call = json.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
        except (EOFError, ConnectionResetError):  # the latter if the trainer has ended with messages unread
            os._exit(0)
        worker.take(call, payload)


def loaded(file: str, name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The class or function that makes environments. Raises UserError if there is none, or if it has other options."""
    make = load_function(file, name, "class or function")
    if inspect.isclass(make):
        for method in ("reset", "step"):
            if not callable(getattr(make, method, None)):
                raise UserError(f"{file}: the class {name} has no method {method}", f"write one: def {method}(self, …)")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise UserError(f"{file}: {name} cannot be called with the options {', '.join(options) or 'none'}: {error}",
                        "correct environment.options") from None  # fmt: skip
    except ValueError:  # a class in C without a signature
        pass
    return make


class _Worker:
    """The environments of this process."""

    def __init__(self, connection: Connection, make: Callable[..., Any], options: dict[str, Any]):
        self._connection, self._make, self._options = connection, make, options
        self._open: dict[int, tuple[Any, str]] = {}  # the environment of each conversation, and its folder
        self._lock = threading.Lock()  # of the connection
        self._loop: asyncio.AbstractEventLoop | None = None

    def take(self, call: dict[str, Any], payload: bytes) -> None:
        """Answers a call: at once, or beside others if its methods are coroutines."""
        number, began, columns, answers = call["id"], time.monotonic(), dict[str, Any](), list[str]()
        try:
            if payload:
                columns, folder, answers = pickle.loads(payload)
                self._open[number] = self._make(**self._options), folder
        except BaseException as error:  # an environment may raise anything, SystemExit included
            self._send({"id": number, "together": _is_async(self._make)}, began, Observation(), _told(error))
            return
        environment, folder = self._open.get(number, (None, ""))
        if call["answer"] is not None:
            answers = [*answers, call["answer"]]
        elif not payload:
            del self._open[number]
            work = _closed(environment)
        if payload or call["answer"] is not None:
            work = _continued(environment, folder, columns if payload else None, answers)
        is_async = _is_async(environment)
        whole = self._answered({"id": number, "together": is_async}, work, call["limit"] if is_async else None)
        if is_async:
            asyncio.run_coroutine_threadsafe(whole, self._running_loop())
        else:
            _at_once(whole)

    async def _answered(
        self, head: dict[str, Any], work: Coroutine[Any, Any, Observation], limit: float | None
    ) -> None:
        began = time.monotonic()
        try:
            # the trainer ends a process that does not answer; here, only a call that waits is ended
            found, error = await (work if limit is None else asyncio.wait_for(work, limit)), None
        except TimeoutError:
            found, error = Observation(), f"no result after {limit:.3g} s"
        except BaseException as raised:
            found, error = Observation(), _told(raised)
        self._send(head, began, found, error)

    def _send(self, head: dict[str, Any], began: float, found: Observation, error: str | None) -> None:
        head |= {"seconds": time.monotonic() - began}
        if error is None:
            head |= {"text": found.text, "reward": found.reward, "done": found.done, "pictures": len(found.pictures)}
        else:
            head |= {"error": error}
        with self._lock:
            try:
                for part in (json.dumps(head).encode(), *found.pictures):
                    self._connection.send_bytes(part)
            except (BrokenPipeError, ConnectionResetError):
                os._exit(0)  # the trainer has closed the connection

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


async def _continued(
    environment: Any, folder: str, columns: dict[str, Any] | None, answers: Sequence[str]
) -> Observation:
    """Begins a conversation if there are columns, and gives it answers. Returns what it said last."""
    found = Observation()
    if columns is not None:
        found = await _named("reset", environment.reset, folder, wanted(environment.reset, columns))
    for answer in answers:
        found = await _named("step", environment.step, folder, {}, answer)
    return found


async def _closed(environment: Any) -> Observation:
    result = environment.close() if hasattr(environment, "close") else None
    if inspect.isawaitable(result):
        await result
    return Observation()


async def _named(
    name: str, method: Callable[..., Any], folder: str, columns: dict[str, Any], *answers: str
) -> Observation:
    """What a method returns, checked. What it raises is told with its name."""
    try:
        result = method(*answers, **columns)
        if inspect.isawaitable(result):
            result = await result
        return checked(result, folder, is_first=name == "reset")
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        raise UserError(f"{name}: {_told(error)}") from None


def _told(error: BaseException) -> str:
    if isinstance(error, UserError):
        return error.message
    return f"{type(error).__name__}: {shortened(error)}".removesuffix(": ")


def wanted(method: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns for which a method has parameters."""
    parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    return {parameter.name: columns[parameter.name] for parameter in parameters if parameter.name in columns}


def _is_async(environment: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(environment, "step", None))


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine that never waits, without an event loop: an environment may have one of its own."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.throw(UserError("it waits for something although step is no coroutine: write async def step"))
