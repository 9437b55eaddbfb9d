"""Traces of single steps by torch's profiler, for ``train.profile``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from megavlm.base.errors import UserError
from megavlm.config.profile_section import ProfileSettings
from megavlm.monitor.phases import Phases
from megavlm.platform import on_gpu

FOLDER = "profile"  # within the output folder

_log = logging.getLogger(__name__)


class Profile:
    """Writes OUTPUT/profile/steps_FIRST-LAST.rank_RANK.json.gz, a Chrome trace of the steps that are recorded.

    If it cannot be written, a warning says so, and training goes on.

    Args:
        settings: the section ``train.profile``.
        output: the output folder of the run.
        rank: this rank.
        world_size: number of ranks.
        phases: the phases of the run, which are ranges of the trace.

    Raises:
        UserError: the section names a rank that does not exist.
    """

    def __init__(self, settings: ProfileSettings, output: Path, rank: int, world_size: int, phases: Phases):
        if (largest := max(settings.ranks)) >= world_size:
            raise UserError(
                f"train.profile.ranks names rank {largest}, but the last of the {world_size} processes is rank "
                f"{world_size - 1}",
                "name ranks that exist",
            )
        self._settings, self._output, self._rank, self._phases = settings, output, rank, phases
        self._profiler: torch.profiler.profile | None = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for step ``number``; it is recorded if the settings say so."""
        settings = self._settings
        is_recorded = settings.start is not None and settings.start <= number <= settings.last
        if not is_recorded or self._rank not in settings.ranks:
            yield
            return
        if self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(
                activities=[*activities, torch.profiler.ProfilerActivity.CUDA] if on_gpu() else activities,
                acc_events=True,  # otherwise torch warns that it forgets earlier cycles, of which there are none
            )
            self._first, self._phases.is_named = number, True
            self._profiler.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._last = number
        if number == settings.last:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded; a run may end before the last step that was to be."""
        if self._profiler is not None:
            self._profiler.stop()
            self._write(self._profiler)
            self._profiler, self._phases.is_named = None, False

    def _write(self, profiler: torch.profiler.profile) -> None:
        folder = self._output / FOLDER
        path = folder / f"steps_{self._first}-{self._last}.rank_{self._rank}.json.gz"
        partial = path.with_name(f".{path.name}")  # it ends in .gz, by which torch knows that it should compress
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            _log.warning("the trace %s cannot be written: %s", path, error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)
