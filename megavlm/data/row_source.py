"""Where the rows of a training run come from: the data loader, or whatever a method brings instead."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megavlm.data.row import Row
from megavlm.data.sources import Source


class RowSource(Protocol):
    """Rows for training without end, on one data-parallel rank, that a checkpoint can continue.

    ``RowLoader`` reads them from files; a method that samples its own answers brings a source of its own.
    """

    @property
    def sources(self) -> list[Source]:
        """The sources of the rows, in the order of the numbers in ``Row.source_ids``."""

    def __iter__(self) -> Iterator[Row]:
        """The rows, from the state that was loaded on."""

    def state_dict(self) -> list[dict[str, Any]]:
        """States of numbers, strings, and lists of them: as many on each data-parallel rank, one for each worker."""

    def load_state_dict(self, states: list[dict[str, Any]]) -> str | None:
        """Continue from the states of all data-parallel ranks, before the first row.

        Returns:
            None if the same rows come as without an interruption; otherwise what is different, for a message.
        """

    def close(self) -> None:
        """Ends processes and connections; no row can be read afterwards."""


class MappedRows:
    """The rows of another source with something done to each.

    Args:
        source: where rows and state come from.
        change: called with the iterator over the source's rows; returns the one to be read instead.
    """

    def __init__(self, source: RowSource, change: Callable[[Iterator[Row]], Iterator[Row]]):
        self._source, self._change = source, change

    @property
    def sources(self) -> list[Source]:
        return self._source.sources

    def __iter__(self) -> Iterator[Row]:
        return self._change(iter(self._source))

    def state_dict(self) -> list[dict[str, Any]]:
        return self._source.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> str | None:
        return self._source.load_state_dict(states)

    def close(self) -> None:
        self._source.close()
