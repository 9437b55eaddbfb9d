"""Rows of a finite data file over all data ranks, in step, with a progress bar."""

import itertools
from collections.abc import Iterator

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


class EvalRows:
    """Iterates over (window, how many of its rows count).

    Ranks of an expert-parallel group, or that share frames, belong to different data ranks and must forward together:
    a data rank that has no row left repeats its last, and a window that is not full is filled up with it. Those rows,
    at the window's end, do not count.

    Args:
        rows: this data rank's rows on the leader of each model-parallel group, else None.
        what: word beside the progress bar.
        size: rows of a window; as many as pipeline stages fill the pipeline.
    """

    def __init__(self, session: Session, rows: Iterator[Row] | None, what: str, size: int = 1):
        self._session, self._rows, self._what, self._size = session, rows, what, size

    def __iter__(self) -> Iterator[tuple[Window, int]]:
        session, size = self._session, self._size
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        feed, last = Feed(session.vlm, self._rows), StepRows([], [])
        with Progress(*columns, disable=not session.is_first) as bar:
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
                if not last.hosts:
                    raise UserError(
                        f"{self._what}: there are fewer samples than data ranks, {session.groups.dp_size}",
                        "start fewer processes",
                    )
                missing = size - real
                filled = StepRows(rows.hosts + last.hosts * missing, rows.full + last.full * missing)
                yield next(feed.windows(filled, size)), real
                bar.update(task, completed=done)
            bar.update(task, total=done - 1)

    def gather(self, results: list) -> list:
        """All ranks' results on rank 0, in no particular order; an empty list elsewhere."""
        return list(itertools.chain.from_iterable(gather_objects(results, self._session.groups.world_host)))


def note_settings(settings: Settings) -> None:
    """Leaves config.yaml in an output folder that has none: the report of a run finds its answers by it."""
    path = required(settings.output, "output") / "config.yaml"
    if not path.exists():
        write_text(path, resolved_yaml(settings))
