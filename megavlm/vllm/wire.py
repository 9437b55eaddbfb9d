"""The messages between the trainer and a server of vLLM: a JSON head and bytes. Both sides import this module.

It imports the standard library alone, because the environment of vLLM need not have what the trainer has.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<Q")
TRANSPORT = "megavlm"
"""Name under which our transport of weights is registered in vLLM."""


def packed(head: dict[str, Any], blob: bytes = b"") -> bytes:
    """A message: the length of the head in 8 bytes, the head as JSON, then the bytes."""
    text = json.dumps(head).encode()
    return b"".join((_LENGTH.pack(len(text)), text, blob))


def unpacked(message: bytes) -> tuple[dict[str, Any], memoryview]:
    """What ``packed`` was given. Raises ValueError if it is no such message."""
    if len(message) < _LENGTH.size:
        raise ValueError("the message is too short")
    end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    if end > len(message):
        raise ValueError("the message is cut off")
    try:
        return json.loads(message[_LENGTH.size : end]), memoryview(message)[end:]
    except RecursionError:
        raise ValueError("the head is nested too deeply") from None


def folder_for(num_bytes: int, memory: Path) -> Path | None:
    """Where a file of this size is written: in ``memory``, or None, where temporary files are, if it has no room.

    Twice the size must be free, because other servers may write at the same time.
    """
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes else None


SERVER = "MEGAVLM_VLLM_SERVER"
"""Environment variable with the process id of a server, for its workers."""

RUN = "X-Megavlm-Run"
"""Header in which the trainer names itself to a server that was started elsewhere. This reserves the server for it."""
