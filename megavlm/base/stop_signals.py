"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP: when they end a process at once, and when they ask it to stop with its step.

A thread acts on the signals. Python's own handlers run only between two instructions of the main thread, which may wait
for minutes in a collective, for a disk or for ranks that never come.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A launcher passes a signal on to processes that have received it already, so that it arrives twice within moments.
_ECHO_SECONDS = 1.0
_NAMES = {signal.SIGINT: "Ctrl-C"}
BEFORE_THE_FIRST_STEP = "ended by {} before the first step of this start; no checkpoint was written"
AT_ONCE = "ended by a second {}; the steps since the newest checkpoint are lost"
_AFTER = "stopping after this step"
_WITHOUT = "stopping without this step, whose answers are sampled again when the run continues"


class StepLeft(Exception):
    """A stop signal has ended a step in which nothing was changed yet. Raised on all ranks."""


def handled() -> list[signal.Signals]:
    """The signals that ask for a stop. SIGHUP is none of them if it was ignored before, as `nohup` asks for."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _HANDLED if not (ignored and number == signal.SIGHUP)]


def name_of(number: int) -> str:
    """The name of a signal in messages."""
    return _NAMES.get(signal.Signals(number)) or signal.Signals(number).name


def status_of(number: int) -> int:
    """The exit status of a process that a signal ended, as shells give it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


class Requests:
    """The requests to stop that have arrived.

    Args:
        echo_seconds: time after the first signal in which others count as the same one.

    Attributes:
        first: number of the first signal; None if there was none.
    """

    def __init__(self, echo_seconds: float):
        self.first: int | None = None
        self._echo_seconds, self._time = echo_seconds, 0.0

    def add(self, number: int) -> Literal["first", "again", "at once"]:
        """Notes a signal and returns what it means.

        The first one asks for a stop. Ctrl-C after any other, or SIGTERM after SIGTERM, ends the process at once. (A
        cluster sends SIGUSR1 some minutes before SIGTERM; the checkpoint may still be written between them.)
        """
        now = time.monotonic()
        if self.first is None:
            self.first, self._time = number, now
            return "first"
        insists = number == signal.SIGINT or number == self.first == signal.SIGTERM
        return "at once" if insists and now > self._time + self._echo_seconds else "again"


class StopSignals:
    """Acts on the stop signals of this process. ``watched`` makes it.

    Args:
        quiet: whether to print nothing, because another process tells the user.
        echo_seconds: see ``Requests``.

    Attributes:
        speak: shows that the run is about to stop, where a progress bar is on the screen; None: plain standard error.
        may_leave: whether the present step may end before it has changed anything (see ``leavable``).
    """

    speak: Callable[[str], None] | None = None
    may_leave = False

    def __init__(self, *, quiet: bool, echo_seconds: float = _ECHO_SECONDS):
        self._quiet, self._requests, self._deferring = quiet, Requests(echo_seconds), False
        self._lock, self._is_leavable = threading.Lock(), False

    @property
    def is_leaving(self) -> bool:
        """Whether a signal has asked for a stop, and the step is where it may be left."""
        return self.asked and self._leaves

    @property
    def _leaves(self) -> bool:
        return self.may_leave and self._is_leavable

    @contextmanager
    def leavable(self) -> Iterator[None]:
        """Around the part of a step that has changed nothing yet."""
        self._is_leavable = True
        try:
            yield
        finally:
            self._is_leavable = False

    @property
    def asked(self) -> bool:
        """Whether a signal has asked for a stop."""
        return self._requests.first is not None

    def defer(self) -> None:
        """From now on, the first signal only sets ``asked``; until now it has ended the process."""
        with self._lock:
            self._deferring = True

    def receive(self, number: int) -> None:
        """Acts on a signal, in any thread."""
        with self._lock:
            meaning = self._requests.add(number)
            if meaning == "at once":
                self._end(AT_ONCE, number)
            elif meaning == "first" and not self._deferring:
                self._end(BEFORE_THE_FIRST_STEP, number)
            elif meaning == "first":
                again = " (press Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
                self._announce(f"{_WITHOUT if self._leaves else _AFTER}{again}")

    def end_before_first_step(self) -> None:
        """Ends the process if a signal has asked for it. For a rank that lost another one to the same signal."""
        with self._lock:
            if self._requests.first is not None:
                self._end(BEFORE_THE_FIRST_STEP, self._requests.first)

    def _end(self, message: str, number: int) -> None:
        self._say(f"error: {message.format(name_of(number))}\n")
        if not self._quiet and sys.stderr.isatty():
            self._say("\x1b[?25h")  # a progress bar hides the cursor
        os._exit(status_of(number))

    def _announce(self, text: str) -> None:
        if self.speak is None or self._quiet:
            self._say(f"{text}\n")
        else:  # in a thread, because it may wait for the main thread, and a second signal must not
            threading.Thread(target=self.speak, args=(text,), daemon=True).start()

    def _say(self, text: str) -> None:
        if not self._quiet:
            os.write(2, text.encode())  # not print, whose lock the main thread may hold


_active: list[StopSignals] = []


@contextmanager
def watched(*, quiet: bool | None = None, has_parent: bool = False) -> Iterator[StopSignals]:
    """Acts on stop signals within the block. Within another such block it yields the ``StopSignals`` of that one.

    Call it in the main thread.

    Args:
        quiet: see ``StopSignals``; None: only rank 0 speaks.
        has_parent: whether a parent passes on the first signal that it gets, and ends this process itself when the user
            insists. All signals after the first one then say the same, however late the parent comes to pass it on, and
            those after the block are ignored.
    """
    if _active:
        yield _active[0]
        return
    is_quiet = int(os.environ.get("RANK", 0)) > 0 if quiet is None else quiet
    signals = StopSignals(quiet=is_quiet, echo_seconds=math.inf if has_parent else _ECHO_SECONDS)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, _ignore) for number in handled()}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, signals), name="stop signals", daemon=True)
    _active.append(signals)
    thread.start()
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if has_parent else handler)
        os.close(writing)  # ends the thread
        thread.join(timeout=1)
        _active.clear()


@contextmanager
def leavable() -> Iterator[None]:
    """Around the part of a step that has changed nothing yet: a run that is asked to stop need not finish it.

    Whoever works there asks ``is_leaving`` from time to time, and raises StepLeft on all ranks if it is true on any.
    """
    with _active[0].leavable() if _active else nullcontext():
        yield


def is_leaving() -> bool:
    """Whether a stop signal of this process has asked for a stop within ``leavable``, in a step that may be left."""
    return bool(_active) and _active[0].is_leaving


def _watch(reading: int, signals: StopSignals) -> None:
    while arrived := os.read(reading, 16):
        for number in arrived:
            if number in _HANDLED and signal.getsignal(number) is _ignore:  # nobody else handles it meanwhile
                signals.receive(number)
    os.close(reading)


def _ignore(number: int, frame: object) -> None:
    """Python's handler: nothing, because the thread acts."""


def _forget_in_child() -> None:
    """In a forked process, such as a data worker: its signals are not those of the trainer."""
    if _active:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
