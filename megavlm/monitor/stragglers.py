"""Finds slow ranks: measures the time of each rank in the phases whose duration differs between ranks.

All other phases end in a collective and take as long as on the slowest rank, so their time does not show which rank is
slow. Reading rows (on the leader of a model-parallel group) and encoding frames (before their features are exchanged)
do not wait for other ranks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.platform import mark, seconds_between


class Stragglers:
    """Measures the time of this rank's own work in a step, and compares it with that of the other ranks.

    Args:
        group: all ranks, in a group for host tensors.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.start()

    def start(self) -> None:
        """Starts the measurement of a step."""
        self._data = 0.0
        self._marks: list[tuple[torch.cuda.Event | float, torch.cuda.Event | float]] = []

    def rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the same rows and measures the time to wait for each."""
        while True:
            began = time.perf_counter()
            try:
                row = next(rows)
            except StopIteration:
                return
            finally:
                self._data += time.perf_counter() - began
            yield row

    @contextmanager
    def tower(self) -> Iterator[None]:
        """A context for the tower's own work on this rank; measures its time."""
        start = mark()
        yield
        self._marks.append((start, mark()))

    def fields(self) -> dict[str, float | int | None]:
        """The fields for metrics.jsonl (``megavlm.monitor.metrics``) on rank 0, {} elsewhere. Call it on all ranks.

        It does not have to wait for the device: the gradient norms, which the device computes after the tower's work,
        have already been read.
        """
        own = torch.tensor([self._data, sum(seconds_between(*pair) for pair in self._marks)], dtype=torch.float64)
        all_ranks = [torch.empty_like(own) for _ in range(self._group.size())] if self._group.rank() == 0 else None
        dist.gather(own, all_ranks, group=self._group, group_dst=0)
        if all_ranks is None:
            return {}
        data, tower = torch.stack(all_ranks, dim=1)
        return {
            "seconds_data": data.max().item(),
            "seconds_tower": tower.mean().item(),
            "seconds_tower_max": tower.max().item(),
            "tower_imbalance": (tower.max() / tower.mean()).item() if tower.any() else None,
            "slowest_rank": int((data + tower).argmax()),
        }
