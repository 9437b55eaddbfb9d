"""Reads the rows of a step on the leader and tells all ranks of its group their text, the next step's ahead of time."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.data.row_source import HeldRows
from megavlm.platform import Groups
from megavlm.platform.groups import host_copy
from megavlm.runtime.row_text import share_text, without_pixels

_MOST_BYTES = 1 << 30  # of rows with their pixels that a leader holds for the next step; it reads the others in time


@dataclass
class Read:
    """Rows that were read.

    Attributes:
        hosts: the rows without their pixels, on every rank of the model-parallel group.
        full: the rows with their pixels, only on the leader.
        problem: what has kept the leader from reading more.
    """

    hosts: list[Row]
    full: list[Row]
    problem: Exception | None = None


class Reader:
    """Reads rows on the leader and sends their text to its group.

    Args:
        rows: the rows, on leaders; None elsewhere.
        group: the model-parallel group on the host network.
    """

    def __init__(self, rows: Iterator[Row] | None, group: dist.ProcessGroup):
        self._rows, self._group = rows, group

    def take(self, num_rows: int) -> Read:
        """Reads the next rows, fewer at the end of the rows or with a problem. Call it on all ranks of the group."""
        return self._send(self._read(num_rows))

    def _read(self, num_rows: int, most_bytes: float = float("inf")) -> Read:
        read = Read([], [])
        if self._group.rank() > 0:
            return read
        assert self._rows is not None, "a leader has rows"
        try:
            while len(read.full) < num_rows and most_bytes > 0:
                row = next(self._rows, None)
                if row is None:
                    break
                read.full.append(row)
                read.hosts.append(without_pixels(row))
                most_bytes -= _bytes_of(row)
        except Exception as error:  # it is raised after the text was sent, because the other ranks wait for the leader
            read.problem = error
        return read

    def _send(self, read: Read) -> Read:
        hosts, problem = share_text(read.hosts, read.problem, self._group)
        return Read(hosts, read.full, problem)


class ReadAhead(Reader):
    """A reader that can read the rows of the next step while this one computes. Create it on all ranks.

    The leader takes the rows from its source at once, on the main thread, as ever; a thread of each rank sends and
    receives their text in a group of its own. A checkpoint that is written before they are taken has the state of the
    source without them, and at the end of a run they are dropped.

    Args:
        rows: the rows, on leaders; None elsewhere.
        source: where they come from; None elsewhere.
        groups: the process groups of the run.
        timeout_minutes: longest time that sending may wait for the leader to read.
    """

    def __init__(self, rows: Iterator[Row] | None, source: HeldRows | None, groups: Groups, timeout_minutes: float):
        super().__init__(rows, host_copy(groups.members, timeout_minutes))
        self._source = source
        self._coming: Future[Read] | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, num_rows: int) -> None:
        """Reads the rows of the next step and begins to send their text. Call it on all ranks of the group."""
        assert self._coming is None, "the rows of one step are read ahead"
        if self._source is not None:
            self._source.hold()
        read, coming = self._read(num_rows, _MOST_BYTES), Future[Read]()
        self._coming = coming

        def send() -> None:
            try:
                coming.set_result(self._send(read))
            except BaseException as error:  # it is raised where the rows are taken
                coming.set_exception(error)

        self._jobs.put(send)

    def take(self, num_rows: int) -> Read:
        """See ``Reader.take``."""
        if self._coming is None:
            return super().take(num_rows)
        ahead, self._coming = self._coming.result(), None
        if self._source is not None:
            self._source.release()
        missing = num_rows - len(ahead.hosts)
        if ahead.problem is not None or missing == 0:
            return ahead
        rest = super().take(missing)
        return Read(ahead.hosts + rest.hosts, ahead.full + rest.full, rest.problem)

    def close(self) -> None:
        """Waits for what is on its way, and drops it. The reader cannot be used afterwards."""
        if self._coming is not None:
            self._coming.exception()
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _bytes_of(row: Row) -> int:
    values = (getattr(row, field.name) for field in fields(row))
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
