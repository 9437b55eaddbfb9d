"""What all ranks decide together after each step: whether to stop, and whether it is time for a checkpoint."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from megavlm.base.stop_signals import StopSignals


class Decision(NamedTuple):
    """A decision of all ranks: whether to save and stop, and whether a checkpoint is due by the clock of rank 0."""

    stopping: bool
    due: bool


class StopSignal:
    """Notes whether a stop signal (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) has arrived on any rank.

    After such a signal, all ranks save a checkpoint after the current step and exit. A step that has not changed
    anything yet may be left instead, by a StepLeft on all ranks. SLURM can send SIGUSR1 as a
    warning before the time limit.

    Args:
        group: a group of all ranks on the host network.
        signals: the stop signals of this process.
        minutes: time between checkpoints; None: none is due by the clock.
    """

    def __init__(self, group: dist.ProcessGroup, signals: StopSignals, minutes: float | None = None):
        self._group, self._signals, self._seconds = group, signals, None if minutes is None else 60 * minutes
        self._saved = time.monotonic()

    def begin(self) -> None:
        """Makes signals wait for the end of a step. Until now, they have ended the process. Call it on all ranks.

        After the call, this holds on all ranks, so that no rank is in a step when a signal ends another one.
        """
        self._signals.defer()
        try:
            self._agree(False, False)
        except RuntimeError:  # another rank has ended
            time.sleep(0.5)  # the signal that ended it may be on its way
            self._signals.end_before_first_step()
            raise

    def begin_step(self, *, may_leave: bool) -> None:
        """Says whether the step that begins may be left before it has changed anything; the same on all ranks."""
        self._signals.may_leave = may_leave

    def decide(self) -> Decision:
        """Call it on all ranks after each step. The result is the same on all ranks."""
        first = self._group.rank() == 0
        due = first and self._seconds is not None and time.monotonic() >= self._saved + self._seconds
        return self._agree(self._signals.asked, due)

    def saved(self) -> None:
        """Starts the clock again, after a checkpoint."""
        self._saved = time.monotonic()

    def _agree(self, *mine: bool) -> Decision:
        flags = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return Decision(*map(bool, flags.tolist()))
