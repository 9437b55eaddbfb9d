"""Handles SIGTERM and SIGUSR1, which make a run save a checkpoint and exit."""

import signal

import torch
import torch.distributed as dist


class StopSignal:
    """Notes whether SIGTERM or SIGUSR1 has arrived on any rank.

    After such a signal, all ranks save a checkpoint after the current step and exit. SLURM can send SIGUSR1 as a
    warning before the time limit.

    Args:
        group: a group of all ranks on the host network.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._asked = group, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether a signal has arrived on any rank. The result is the same on all ranks. Call it on all ranks."""
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
