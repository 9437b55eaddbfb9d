"""For which run a server works. It imports the standard library alone, as ``wire``."""

import time

HELD = 60.0  # seconds for which a server stays reserved after the last request of its run


class Reservation:
    """The run that has asked first, until it says that it has ended, or asks no more."""

    def __init__(self) -> None:
        self._run, self._heard = "", 0.0

    def ask(self, run: str) -> None:
        """A run has asked. It gets the server if no other run has it."""
        if self._run in ("", run) or self.seconds > HELD:
            self._run, self._heard = run, time.monotonic()

    def release(self, run: str) -> None:
        """A run has ended."""
        if run == self._run:
            self._run = ""

    @property
    def seconds(self) -> float:
        """Since the last request of the run."""
        return time.monotonic() - self._heard

    def told(self) -> dict[str, object]:
        """What ``Keeper`` needs to know: "run", "" if nobody has the server, and "run_seconds"."""
        return {"run": self._run, "run_seconds": self.seconds}
