"""Reads the JSON files of model folders and checkpoints."""

import json
from pathlib import Path

from megavlm.base.errors import UserError


def read_json(file: Path, remedy: str) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, is not JSON, or contains something other than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {_cause(error)}", remedy) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} contains a {type(content).__name__} instead of a JSON object", remedy)
    return content


def _cause(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
