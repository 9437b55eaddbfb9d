"""Reads JSON that may be damaged: files of models, checkpoints and runs, and lines of data."""

import json
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError


def parse_json(text: str | bytes) -> Any:
    """What ``json.loads`` returns.

    Raises:
        ValueError: the text is not JSON, or its lists and objects are nested too deeply for Python to read them, for
            which ``json.loads`` has a RecursionError that nobody expects.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def read_json(file: Path, remedy: str) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, is not JSON, or contains something other than an object.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {_cause(error)}", remedy) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} contains a {type(content).__name__} instead of a JSON object", remedy)
    return content


def _cause(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
