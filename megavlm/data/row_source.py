"""The interface of sources of training rows: the data loader, or a source that a method provides."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megavlm.data.row import Row
from megavlm.sources.blend import Source


class RowSource(Protocol):
    """An endless source of training rows on one data-parallel rank, which can continue from a checkpoint.

    ``RowLoader`` reads rows from files. A method that samples its own answers provides its own source.
    """

    @property
    def sources(self) -> list[Source]:
        """The data sources, in the order of the numbers in ``Row.source_ids``."""

    def __iter__(self) -> Iterator[Row]:
        """The rows, starting from the loaded state."""

    def state_dict(self) -> list[dict[str, Any]]:
        """States of numbers, strings, and lists of them: as many on each data-parallel rank, one for each worker."""

    def load_state_dict(self, states: list[dict[str, Any]]) -> str | None:
        """Continue from the states of all data-parallel ranks. Call it before the first row.

        Returns:
            None if the rows are the same as without an interruption; otherwise a text that says what differs.
        """

    def close(self) -> None:
        """End processes and connections. No row can be read afterwards."""


class MappedRows:
    """The rows of another source after a change.

    Args:
        source: the source of rows and state.
        change: maps the iterator over the source's rows to the iterator over changed rows.
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


class HeldRows(MappedRows):
    """The rows of another source, of which a step ahead of time may have taken more than were trained on.

    Args:
        source: the source of rows and state.
    """

    def __init__(self, source: RowSource):
        super().__init__(source, lambda rows: rows)
        self._held: bytes | None = None

    def hold(self) -> None:
        """From now on, ``state_dict`` returns the state of this moment, whatever rows are taken."""
        self._held = pickle.dumps(self._source.state_dict())  # a copy; pickle makes it in a millisecond

    def release(self) -> None:
        """From now on, ``state_dict`` returns the state of its moment again."""
        self._held = None

    def state_dict(self) -> list[dict[str, Any]]:
        return super().state_dict() if self._held is None else pickle.loads(self._held)
