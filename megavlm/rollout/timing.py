"""How long the parts of sampling take."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Timer = Callable[[str], AbstractContextManager[None]]
"""Makes a context manager around the part of the work that its argument names: tower, prefill, decoding, sampling."""


def untimed(_: str) -> AbstractContextManager[None]:
    """A timer that does nothing."""
    return nullcontext()
