"""Rows of a finite data file on all data-parallel ranks, with the same number of windows on each and a progress bar."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.config.load import resolved_yaml
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.platform.collectives import gather_objects
from megavlm.runtime.feed import Feed, StepRows, Window
from megavlm.runtime.session import Session

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class EvalRows:
    """Iterates over (window, number of its rows that count).

    The ranks of an expert-parallel group, and ranks that share frames, belong to different data-parallel ranks and must
    run forward passes together. Therefore a data-parallel rank whose rows are used up repeats its last row, and an
    incomplete window is filled with that row. The repeated rows are at the end of the window and do not count.

    Args:
        session: the session of the command.
        rows: the rows of this data-parallel rank on the leader of each model-parallel group; None elsewhere.
        what: label of the progress bar.
        size: number of rows of a window; as many rows as pipeline stages fill the pipeline.
        filler: makes a row for a data-parallel rank that has none at all; None: that is an error.
    """

    def __init__(
        self,
        session: Session,
        rows: Iterator[Row] | None,
        what: str,
        size: int = 1,
        filler: Callable[[], Row] | None = None,
    ):
        self._session, self._rows, self._what, self._size = session, rows, what, size
        self._filler = filler

    def __iter__(self) -> Iterator[tuple[Window, int]]:
        session, size = self._session, self._size
        feed, last = Feed(session.vlm, self._rows), StepRows([], [])
        with Progress(*PROGRESS, disable=not session.is_first) as bar:
            task = bar.add_task(self._what, total=None)
            for done in itertools.count(1):
                rows = feed.rows(size)
                more = torch.tensor([int(rows is not None)])
                dist.all_reduce(more, op=dist.ReduceOp.MAX, group=session.groups.world_host)
                if not more.item():
                    break
                rows = rows or StepRows([], [])
                real = len(rows.hosts)
                last = StepRows(rows.hosts[-1:], rows.full[-1:]) if real else last
                if not last.hosts and self._filler is not None:
                    made = iter([self._filler()]) if session.groups.is_leader else None
                    last = required(Feed(session.vlm, made).rows(1), "a row")
                if not last.hosts:
                    raise UserError(
                        f"{self._what}: there are fewer samples than data-parallel ranks ({session.groups.dp_size})",
                        "start fewer processes",
                    )
                missing = size - real
                filled = StepRows(rows.hosts + last.hosts * missing, rows.full + last.full * missing)
                yield next(feed.windows(filled, size)), real
                bar.update(task, completed=done)
            bar.update(task, total=done - 1)

    def gather(self, results: list) -> list:
        """Returns the results of all ranks on rank 0, in no particular order; an empty list on the other ranks."""
        return list(itertools.chain.from_iterable(gather_objects(results, self._session.groups.world_host)))


def note_settings(settings: Settings) -> None:
    """Writes config.yaml into the output folder unless it has one; the report of a run uses it to find answers."""
    path = required(settings.output, "output") / "config.yaml"
    if not path.exists():
        write_text(path, resolved_yaml(settings))
