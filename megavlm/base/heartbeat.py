"""Signs of life of this process, for whatever watches it (``monitor.hang_watch``).

Any long work may call ``beat``, at no cost if nothing listens. Where one call of a library takes long,
``while_bytes_flow`` calls it as long as the process reads or writes.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_LOOK = 1.0  # seconds between two looks at the bytes
_LEAST = 1 << 16  # bytes between two looks that count as progress; looking itself reads a hundred
_listener: Callable[[str], None] | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """From now on, ``beat`` calls `listener`; None: nothing. The listener may be called from any thread."""
    global _listener
    _listener = listener


os.register_at_fork(after_in_child=lambda: listen(None))  # the watch is the parent's


def beat(done: str) -> None:
    """Reports progress. `done` names what has been done last, in words that fit behind "since"."""
    if _listener is not None:
        _listener(done)


@contextmanager
def while_bytes_flow(what: str, process: int | None = None) -> Iterator[None]:
    """While the block runs, each second in which the process has read or written data is a sign of life.

    A disk that no longer answers therefore still ends a watched process.

    Args:
        what: the work, for the message.
        process: id of the process whose bytes count, such as a child that writes; None: this process.
    """
    if _listener is None:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        before = _bytes_of(process)
        while not ended.wait(_LOOK):
            now = _bytes_of(process)
            if now >= before + _LEAST:
                beat(f"{what} (bytes were read or written)")
            before = now

    thread = threading.Thread(target=look, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bytes_of(process: int | None) -> int:
    """Bytes that the process has read and written so far, including those in the cache; -1 if it has ended."""
    with suppress(OSError, ValueError):
        with open(f"/proc/{process or os.getpid()}/io", encoding="ascii") as file:
            counts = dict(line.split(": ") for line in file)
        return int(counts["rchar"]) + int(counts["wchar"])
    return -1
