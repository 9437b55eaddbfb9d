"""Repeats reads of remote files that fail for a moment, so that a hiccup of a server costs no sample."""

import asyncio
import errno
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_SHORT = 60.0  # seconds after the last failure in which a host that has failed is tried only once more
_STATUS = (408, 425, 429, 500, 502, 503, 504)  # what a server says when it may well answer later
_ERRNO = (errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO)
# S3's words, of which s3fs makes an OSError without a number
_WORDS = ("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "reduce your request rate")

_told: set[str] = set()
_failed: dict[str, float] = {}  # hosts that failed in spite of all tries, and when (time.monotonic)


def retried[T](url: str, read: Callable[[], T]) -> T:
    """What `read` returns; it is called again after a transient error, up to ``len(DELAYS)`` times.

    The first repetition for a host is said on standard error. A host that has failed in spite of all tries is tried
    only once more for the next reads, until one succeeds or a minute has passed: if it is down, the run must not wait
    for it at each sample.

    Raises whatever `read` raises if the error is not transient or all tries are used up.
    """
    host = urlsplit(url).netloc or url.partition("://")[0]
    is_down = time.monotonic() - _failed.get(host, -_SHORT) < _SHORT
    for delay in DELAYS[:1] if is_down else DELAYS:
        try:
            found = read()
        except Exception as error:
            if not is_transient(error):
                raise
            if host not in _told:
                _told.add(host)
                print(
                    f"{host} failed for a moment ({type(error).__name__}: {str(error)[:200]}); it is tried again, up "
                    f"to {len(DELAYS)} times. This is said once.",
                    file=sys.stderr,
                )
            time.sleep(delay)
        else:
            _failed.pop(host, None)
            return found
    try:
        found = read()
    except Exception:
        _failed[host] = time.monotonic()
        raise
    _failed.pop(host, None)
    return found


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or its cause, may be gone at the next try: a time-out, a lost connection, a busy server."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    if any(isinstance(error, PermissionError) for error in chain):  # an address that may not be read
        return False
    for error in chain:
        status = getattr(error, "status", None)  # of aiohttp and of Google's file system
        if isinstance(status, int):
            return status in _STATUS
        if isinstance(error, TimeoutError | ConnectionError | asyncio.IncompleteReadError):
            return True
        if isinstance(error, OSError) and (error.errno in _ERRNO or any(word in str(error) for word in _WORDS)):
            return True
        if type(error).__module__.partition(".")[0] == "aiohttp" and _is_lost(error):
            return True
    return False


def _is_lost(error: BaseException) -> bool:
    import aiohttp  # only once one of its exceptions was raised

    return isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
