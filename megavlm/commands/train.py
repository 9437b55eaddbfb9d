"""`megavlm pretrain`, `sft`, `rm`, `dpo`, `kto`: a training run with one of the methods of ``align.registry``."""

from collections.abc import Callable, Sequence

from megavlm.align.registry import METHODS, make_method
from megavlm.base.heartbeat import while_bytes_flow
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.evaluation.held_out import evaluation_hooks
from megavlm.output.folder import StartOptions
from megavlm.report.loss_plot import write_loss_plot
from megavlm.report.run_report import write_report
from megavlm.training.hooks import Hook
from megavlm.training.loop import train
from megavlm.training.run import Run


def main(settings: Settings, method: str, restart: bool = False, change: Sequence[str] = ()) -> int:
    """Trains with the method of this name, then writes loss.png and report.html into the output folder.

    ``restart`` and ``change``: see ``StartOptions``.
    """
    options = StartOptions(restart, tuple(change))
    hooks = [*evaluation_hooks(settings, METHODS[method].kind), Hook(_report, at_end=True)]
    return train(settings, make_method(method, settings), hooks, options)


def _report(run: Run, step: int, say: Callable[[str], None]) -> None:
    if not run.session.is_first:
        return
    output = required(run.session.settings.output, "output")
    try:
        with while_bytes_flow("the report"):
            write_loss_plot(output)
            say(f"report · {write_report(output)}")
    except Exception as error:  # the run itself is complete, so a failed report is no error
        say(f"the report could not be written: {error}")
