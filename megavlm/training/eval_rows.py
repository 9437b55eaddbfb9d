"""Rows of a finite data file over all data ranks, in step, with a progress bar."""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megavlm.config.errors import UserError
from megavlm.config.files import write_text
from megavlm.config.load import resolved_yaml
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.training.feed import Feed, Window
from megavlm.training.setup import Session


class EvalRows:
    """Iterates over (window of one row, whether its results count).

    Ranks of an expert-parallel group belong to different data ranks and must forward together: a data rank that has no
    row left repeats its last, whose results do not count.

    Args:
        rows: this data rank's rows on the leader of each model-parallel group, else None.
        what: word beside the progress bar.
    """

    def __init__(self, session: Session, rows: Iterator[Row] | None, what: str):
        self._session, self._rows, self._what = session, rows, what

    def __iter__(self) -> Iterator[tuple[Window, bool]]:
        session, leader = self._session, self._session.groups.is_leader
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not session.is_first) as bar:
            task = bar.add_task(self._what, total=None)
            last: list[Row] = []

            def pulled() -> Iterator[Row]:
                for row in self._rows:
                    last[:] = [row]
                    yield row

            source = pulled() if leader else None
            feed = Feed(session.vlm, source)
            for done in itertools.count(1):
                window = feed.window(1)
                more = torch.tensor([int(window is not None)])
                dist.all_reduce(more, op=dist.ReduceOp.MAX, group=session.groups.world_host)
                if not more.item():
                    break
                real = window is not None
                if not real:
                    window = Feed(session.vlm, iter(last) if leader else None).window(1)
                if window is None:
                    raise UserError(
                        f"data.eval has fewer samples than there are data ranks, {session.groups.data_size}",
                        "start fewer processes",
                    )
                yield window, real
                bar.update(task, completed=done)
            bar.update(task, total=done - 1)

    def gather(self, results: list) -> list:
        """All ranks' results on rank 0, in no particular order; an empty list elsewhere."""
        world = dist.get_world_size()
        boxes = [None] * world if self._session.is_first else None
        dist.gather_object(results, boxes, dst=0, group=self._session.groups.world_host)
        return list(itertools.chain.from_iterable(boxes)) if boxes else []


def note_settings(settings: Settings) -> None:
    """Leaves config.yaml in an output folder that has none: the report of a run finds its answers by it."""
    path = settings.output / "config.yaml"
    if not path.exists():
        write_text(path, resolved_yaml(settings))
