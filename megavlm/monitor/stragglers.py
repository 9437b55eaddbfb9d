"""Who holds a step up: each rank's own time in the phases whose work differs from rank to rank.

Every other phase ends in a collective and takes as long as on the slowest rank, whoever that is. Reading rows, on a
group's leader, and encoding frames, before their features are exchanged, do not wait for another rank.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.platform import mark, seconds_between


class Stragglers:
    """Times this rank's own work in a step, and compares it with the other ranks'.

    Args:
        group: all ranks, on the host network.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._data, self._marks = 0.0, []

    def rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows; the wait for each is counted."""
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
        """Around what the tower computes on this rank alone."""
        start = mark()
        yield
        self._marks.append((start, mark()))

    def fields(self) -> dict[str, float | int | None]:
        """For metrics.jsonl (``megavlm.monitor.metrics``), on rank 0; {} on the others. Call it on all ranks.

        It waits for nothing: the step's norms have been read since, which the device computed after the tower's work.
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
