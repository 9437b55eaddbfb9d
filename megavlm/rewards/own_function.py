"""A reward function in a Python file of the user's own: loading it, and calling it."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened


def load_function(file: str, function: str, kind: str = "function") -> Callable[..., Any]:
    """Runs a Python file once and returns a function of it, which may be async. The file can import its neighbours.

    Args:
        file: its path.
        function: the name of the function; anything that can be called, such as a class, will do.
        kind: what it is called in messages.

    Raises:
        UserError: the file cannot be run, or has no such function. The message names the file, the line and the cause.
    """
    path = Path(file).absolute()
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file", "its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        if error.filename == str(path):
            raise UserError(f"{file} does not exist", f"relative paths start from {Path.cwd()}") from None
        raise _unusable(file, path, error) from None
    except BaseException as error:  # SystemExit, too
        raise _unusable(file, path, error) from None
    found = getattr(module, function, None)
    if not callable(found):
        is_known = inspect.isfunction if kind == "function" else callable
        known = [name for name, value in vars(module).items() if is_known(value) and not name.startswith("_")]
        what = f"has no {kind}" if found is None else f"has something that is no {kind} as"
        remedy = "its functions" if kind == "function" else "what can be called in it"
        raise UserError(f"{file} {what} {function}", f"{remedy}: {', '.join(known) or 'none'}")
    return found


def call(function: Callable[..., Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
    """The result of a function, awaited if it is a coroutine. It gets the columns for which it has parameters."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        names = {parameter.name for parameter in parameters}
        columns = {name: column for name, column in columns.items() if name in names}
    result = function(completions, **columns)
    if not inspect.isawaitable(result):
        return result
    import asyncio  # a third of what a worker imports

    return asyncio.run(_awaited(result))


async def _awaited(result: Any) -> Any:
    return await result


def _unusable(file: str, path: Path, error: BaseException) -> UserError:
    """Names the line of the file at which an exception happened; for wrong syntax, also in a file that it imports."""
    text = f"{type(error).__name__}: {shortened(error)}"
    if isinstance(error, SyntaxError) and error.filename:
        text = f"{type(error).__name__}: {error.msg}"
        file = file if error.filename == str(path) else error.filename
        line = error.lineno
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else None
    return UserError(f"{file}{f':{line}' if line else ''} cannot be used: {text}", "repair the file")
