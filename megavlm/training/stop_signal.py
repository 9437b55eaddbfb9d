"""SIGTERM and SIGUSR1, which ask a run to save and leave."""

import signal

import torch
import torch.distributed as dist


class StopSignal:
    """SIGTERM or SIGUSR1 (SLURM's warning before the time limit) asks all ranks to save and leave after this step.

    Args:
        group: all ranks, on the host network.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._asked = group, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether any rank was asked; the same answer on all of them. Call it on all ranks."""
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
