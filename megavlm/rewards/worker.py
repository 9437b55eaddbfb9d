"""A reward worker: a process that loads all rewards once and judges one group of answers after another.

It imports nothing that is slow to load, so that a killed worker is soon replaced. Messages, all over one connection:

    to the worker     JSON: list of `Reward` fields, once; then for each call JSON {"reward": index, "answers": indices
                      or null for all} and a pickled (completions, columns)
    from the worker   JSON: {"ready": true} or {"unusable": [message, remedy], "reward": index}, once; then for each
                      call {"values": [number or null], "causes": {position: cause}} or {"error": cause}
"""

import json
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.processes import end_with_parent, ignore_stop_signals
from megavlm.base.quoting import quoted, shortened
from megavlm.rewards import choice, functions
from megavlm.rewards.own_function import call, load_function

_MAKERS: dict[str, Callable[..., functions.Reward]] = {
    "exact": functions.exact,
    "choice": choice.choice,
    "format": functions.format,
    "length": functions.length,
}


def main(handle: int, parent: int) -> None:
    """Runs until the trainer kills this process or ends itself.

    Args:
        handle: file descriptor of the connection to the trainer.
        parent: process id of the trainer.
    """
    end_with_parent(parent)
    ignore_stop_signals()  # the trainer of a stopped job still needs rewards until its step is done
    connection = Connection(handle)
    loaded = []
    for index, reward in enumerate(json.loads(connection.recv_bytes())):
        try:
            loaded.append(_load(**reward))
        except UserError as error:
            _send(connection, {"unusable": [error.message, error.remedy], "reward": index})
            return
    _send(connection, {"ready": True})
    while True:
        try:
            wanted = json.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
        except (EOFError, ConnectionResetError):  # the latter if the trainer has ended with messages unread
            return
        _send(connection, _judge(loaded[wanted["reward"]], payload, wanted["answers"]))


def _load(name: str | None, options: Mapping[str, Any], file: str | None, function: str | None) -> Callable[..., Any]:
    """The function of a reward: megavlm's own if it has a name, otherwise that in a file."""
    if name == "math":
        from megavlm.rewards import mathematics  # loads sympy

        return mathematics.math(**options)
    if name is not None:
        return _MAKERS[name](**options)
    assert file is not None
    assert function is not None
    return load_function(file, function)


def _judge(function: Callable[..., Any], payload: bytes, answers: Sequence[int] | None) -> dict[str, Any]:
    try:
        completions, columns = pickle.loads(payload)
        if answers is not None:
            completions = [completions[index] for index in answers]
            columns = {name: [column[index] for index in answers] for name, column in columns.items()}
        values, causes = checked(call(function, completions, columns), len(completions))
        return {"values": values, "causes": causes}
    except UserError as error:
        return {"error": error.message}
    except BaseException as error:  # a reward may raise anything, SystemExit and KeyboardInterrupt included
        return {"error": f"{type(error).__name__}: {shortened(error)}".removesuffix(": ")}


def checked(result: Any, count: int) -> tuple[list[float | None], dict[int, str]]:
    """The values that a reward function returned, as numbers.

    Args:
        result: what it returned.
        count: the number of values that it should return.

    Returns:
        The values, None where the reward does not apply or the value is none; and by position, what is wrong with
        those that are no finite numbers.

    Raises:
        UserError: the result is no list of that length.
    """
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise UserError(f"it returned {quoted(result)}, not a list of numbers")
    found = list(result)
    if len(found) != count:
        raise UserError(f"it returned {len(found)} values for {count} answers")
    values: list[float | None] = []
    causes = {}
    for position, value in enumerate(found):
        try:  # numbers of numpy and torch, too, but not text such as "1"
            number = None if value is None else float(value) if hasattr(value, "__float__") else math.nan
        except Exception:
            number = math.nan
        if number is not None and not math.isfinite(number):
            causes[position] = f"it returned {quoted(value)}, which is not a finite number"
            number = None
        values.append(number)
    return values, causes


def _send(connection: Connection, message: dict[str, Any]) -> None:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the trainer has closed the connection
