"""`megavlm pretrain`, `sft`, `rm`, `dpo`, `kto`: a training run with one of the methods of ``align.registry``."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megavlm.align.registry import METHODS, make_method
from megavlm.base.heartbeat import while_bytes_flow
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.evaluation.hooks import evaluation_hooks
from megavlm.output.folder import StartOptions
from megavlm.plan.of_run import PlanOfRun, is_wanted
from megavlm.report.at_checkpoint import ReportAtCheckpoint
from megavlm.report.loss_plot import write_loss_plot
from megavlm.report.run_report import write_report
from megavlm.training.hooks import Hook
from megavlm.training.loop import train
from megavlm.training.run import Run


def main(settings: Settings, method: str, restart: bool = False, change: Sequence[str] = ()) -> int:
    """Trains with the method of this name, then writes loss.png and report.html into the output folder.

    ``restart`` and ``change``: see ``StartOptions``.
    """
    options, reports, made = StartOptions(restart, tuple(change)), _Reports(), make_method(method, settings)
    plan = _Plan(method, settings.log.plan)
    hooks = [
        Hook(plan.at_end, at_end=True, prepare=plan.begin),
        *evaluation_hooks(settings, METHODS[method].kind, made),
        Hook(reports.at_checkpoint, at_checkpoint=True, at_answers=True),
        Hook(reports.at_end, at_end=True),
    ]
    return train(settings, made, hooks, options)


class _Plan:
    """Plans a run in the background, on the first rank (see ``log.plan``)."""

    _PATIENCE = 60.0  # seconds for which the end of a run waits, if it was asked for a plan

    def __init__(self, verb: str, wanted: bool | None) -> None:
        self._verb, self._wanted = verb, wanted
        self._plan: PlanOfRun | None = None

    def begin(self, run: Run) -> None:
        if run.session.is_first and is_wanted(self._wanted):
            self._plan = PlanOfRun(_output(run), self._verb)

    def at_end(self, run: Run, step: int, say: Callable[[str], None]) -> None:
        if self._plan is not None and (told := self._plan.close(self._PATIENCE if self._wanted else 0.0)):
            say(f"the run was not planned: {told}")


class _Reports:
    """Writes the reports of a run, on the first rank: in the background while it goes on, and the last one itself."""

    _background: ReportAtCheckpoint | None = None

    def at_checkpoint(self, run: Run, step: int, say: Callable[[str], None]) -> None:
        if run.session.is_first:
            self._background = self._background or ReportAtCheckpoint(_output(run))
            self._background.due()

    def at_end(self, run: Run, step: int, say: Callable[[str], None]) -> None:
        if not run.session.is_first:
            return
        try:
            with while_bytes_flow("the report"):
                if self._background is not None:
                    self._background.close()
                write_loss_plot(_output(run))
                say(f"report · {write_report(_output(run))}")
        except Exception as error:  # the run itself is complete, so a failed report is no error
            say(f"the report could not be written: {error}")


def _output(run: Run) -> Path:
    return required(run.session.settings.output, "output")
