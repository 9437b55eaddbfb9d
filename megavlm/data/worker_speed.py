"""How long a data worker takes for a row, measured with a real one on the data of a configuration."""

import time
from contextlib import closing
from dataclasses import dataclass

from megavlm.base.machine import processor
from megavlm.base.pools import num_cores
from megavlm.config.data_sections import DataSettings
from megavlm.data.packing import first_fill
from megavlm.data.renderer import Renderer
from megavlm.data.rows import RowDataset
from megavlm.records.records import Kind
from megavlm.sources.blend import Source
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import rows_from_workers

MOST_ROWS = 32
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerSpeed:
    """The speed of one data worker.

    Attributes:
        row_seconds: mean seconds in which it makes a row: it drafts its samples, packs them, reads their pixels, and
            hands the row over in shared memory.
        rows: number of measured rows.
        machine: the processor.
        cores: the number of cores that the measuring process could use.
    """

    row_seconds: float
    rows: int
    machine: str
    cores: int


def worker_speed(
    sources: list[Source],
    renderer: Renderer,
    kind: Kind,
    settings: DataSettings,
    seed: int,
    *,
    most_rows: int = MOST_ROWS,
    enough_seconds: float = ENOUGH_SECONDS,
) -> WorkerSpeed:
    """Takes rows from one worker process as fast as it makes them, and measures the time from the first to the last.

    The packing buffer has its size for the first row from beginning to end, so that each row after the first costs as
    many drafts as it has samples. Epochs and ramps do not count.

    Args:
        sources: the sources of the blend.
        renderer: the renderer of the model's folder, built with the same settings.
        kind: what is trained on.
        settings: the ``data`` section: packing, packing_buffer, max_patches_per_row, shuffle.
        seed: the seed of the order.
        most_rows: number of measured rows at most; there is at least one.
        enough_seconds: seconds after which no further row is awaited.

    Raises:
        UserError: no row can be made.
        RunFailure: the process died several times, or there is too little shared memory.
    """
    dataset = RowDataset(
        sources,
        renderer,
        kind,
        buffer_size=first_fill(settings.packing_buffer) if settings.packing == "best_fit" else 1,
        max_patches=settings.max_patches_per_row,
        seed=seed if settings.shuffle else None,
        first_worker=0,
        stride=1,
        num_workers=1,
        fatal=FatalSamples(sources, 1),
    )
    with closing(rows_from_workers(dataset, 1)) as rows:
        next(rows)  # for it, the buffer is filled
        start, seconds, count = time.monotonic(), 0.0, 0
        while count == 0 or (count < most_rows and seconds < enough_seconds):
            next(rows)
            seconds, count = time.monotonic() - start, count + 1
    return WorkerSpeed(seconds / count, count, processor(), num_cores())
