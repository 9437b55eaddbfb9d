"""Logs metrics.jsonl for TensorBoard. An error while writing never interrupts training."""

from collections.abc import Callable, Mapping
from typing import Any

from megavlm.config.requirements import required
from megavlm.config.settings import Settings

FOLDER = "tensorboard"  # within the output folder
_FLUSH_SECONDS = 10


class TensorboardLog:
    """Event files of one run. Create it on all ranks; rank 0 writes, if ``log.tensorboard`` is set.

    A start that continues the run writes a file of its own, which tells TensorBoard to forget the points of earlier
    files behind the step from which it continues: these steps are repeated.

    Args:
        settings: the settings of the run.
        first_step: the step from which the run continues.
        enabled: False on all ranks except rank 0; then all calls do nothing.
        warn: called with a message if an error occurs; logging then ends.
    """

    def __init__(self, settings: Settings, first_step: int, enabled: bool, warn: Callable[[str], None]):
        self._warn = warn
        self._writer: Any = None  # torch's SummaryWriter
        self.folder = required(settings.output, "output") / FOLDER
        self.is_on = enabled and settings.log.tensorboard
        if self.is_on:
            self._guarded(lambda: self._start(first_step))

    def _start(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        repeated = first_step + 1 if first_step else 0  # step 0 is what was measured before the first one
        self._writer = SummaryWriter(str(self.folder), purge_step=repeated, flush_secs=_FLUSH_SECONDS)

    def log(self, line: Mapping[str, Any]) -> None:
        """Logs one line of metrics.jsonl under the names that its fields have there."""
        self._guarded(lambda: self._write(line))

    def _write(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if value is not None and name != "step" and self._writer is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Writes what waits; a second call does nothing."""
        self._guarded(lambda: self._writer.close() if self._writer is not None else None)
        self.is_on, self._writer = False, None

    def _guarded(self, work: Callable[[], None]) -> None:
        if not self.is_on:
            return
        try:
            work()
        except Exception as error:
            self.is_on, self._writer = False, None
            self._warn(f"warning: TensorBoard's files cannot be written ({error}); continuing without them")
