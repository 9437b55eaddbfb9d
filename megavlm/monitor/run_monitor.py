"""All outputs of a run during training: terminal, metrics.jsonl, wandb, TensorBoard, skipped samples, answers."""

import contextlib
from collections.abc import Mapping, Sequence

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader
from megavlm.monitor.data_errors import DataErrors
from megavlm.monitor.expert_metrics import ExpertLoadFile, ExpertTotals, expert_fields
from megavlm.monitor.metrics import MetricsWriter, read_metrics
from megavlm.monitor.progress import Progress
from megavlm.monitor.rl_warnings import RlWarnings
from megavlm.monitor.rollout_log import LoggedGroup, RolloutLog
from megavlm.monitor.sample_counts import SampleCounts
from megavlm.monitor.tensorboard_log import TensorboardLog
from megavlm.monitor.wandb_log import WandbLog
from megavlm.platform import Groups
from megavlm.records.remarks import WORDS, told
from megavlm.records.skipped_samples import SkippedSample


class RunMonitor:
    """Shows and records the steps of a run. Create it on all ranks and use it as a context manager; rank 0 writes.

    Args:
        settings: the settings of the run.
        title: see ``Progress``.
        header: see ``Progress``.
        first_step: the step from which the run continues; lines of later steps in its files are removed.
        groups: the process groups of the run.
        loader: see ``SampleCounts``.
        is_first: whether this is rank 0.

    Attributes:
        answers_of: the last step whose sampled answers were recorded, on rank 0; otherwise None.
    """

    def __init__(
        self,
        settings: Settings,
        title: str,
        header: Mapping[str, str],
        first_step: int,
        groups: Groups,
        loader: RowLoader | None,
        *,
        is_first: bool,
    ):
        self._loader = loader
        self._settings, self._first_step, self._groups, self._is_first = settings, first_step, groups, is_first
        self._output = required(settings.output, "output")
        self._remarked: set[str] = set()
        self.answers_of: int | None = None
        self._ended = set(loader.given) if loader else set()
        steps = required(settings.train.steps, "train.steps")
        self._progress = Progress(steps, first_step, title, header, enabled=is_first)
        self._metrics = MetricsWriter(self._output, first_step, enabled=is_first)
        self._experts = ExpertLoadFile(self._output)
        self._rollouts = RolloutLog(self._output, first_step, enabled=is_first)
        self._warnings = RlWarnings(read_metrics(self._output) if is_first else ())

    def __enter__(self) -> "RunMonitor":
        settings, data = self._settings, self._settings.data
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._progress)
            stack.enter_context(self._metrics)
            stack.callback(self._experts.flush)
            self._samples = SampleCounts(data.source_names, self._loader, self._groups)
            self._errors = DataErrors(
                self._output,
                self._first_step,
                data.skip_limits,
                self._samples,
                self._loader,
                self._groups,
                self.say,
            )
            self._wandb = WandbLog(settings, enabled=self._is_first, warn=self.say)
            if self._wandb.mode != "off":
                self.say(f"wandb: {self._wandb.description}")
            self._tensorboard = TensorboardLog(settings, self._first_step, self._is_first, self.say)
            stack.callback(self._tensorboard.close)
            if self._tensorboard.is_on:
                self.say(f"tensorboard: {self._tensorboard.folder}")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, message: str) -> None:
        """Shows a message on the terminal, above the progress bar if there is one."""
        self._progress.say(message)

    def count_samples(
        self, step: int, counts: Mapping[str, float], skipped_samples: list[SkippedSample]
    ) -> dict[str, float]:
        """Records the skipped samples of a step; returns fields for metrics.jsonl (see ``DataErrors.take``).

        After the first step, it says which share of the first samples was skipped.

        Remarks (see ``data/remarks.py``) are shown once each, and counted in the lines of steps that have any.
        """
        remarks = {name: int(counts[name]) for name in WORDS if counts.get(name)}
        for name in remarks.keys() - self._remarked:
            self.say(f"{told({name: remarks[name]})[0]} (in step {step}; metrics.jsonl counts them as {name})")
        self._remarked |= remarks.keys()
        if self._is_first and self._loader is not None:  # all ranks come to the end of a source at about the same step
            for name in sorted(set(self._loader.given) - self._ended):
                self._ended.add(name)
                self.say(f"{name} has given its max_tokens (step {step}); the blend goes on without it")
        fields = self._errors.take(step, counts, skipped_samples) | remarks
        if step == self._first_step + 1:
            for text in self._errors.shares():
                self.say(f"{text} so far")
        return fields

    def tell_samples(self) -> None:
        """Says at the end how often the run has passed over each source, and which share of it was skipped."""
        for name, passes in self._samples.epochs.items():
            size = self._samples.sizes[name]
            self.say(f"{name}: {passes:.3g} passes over {counted(size, 'sample')}")
        for text in self._errors.shares():
            self.say(text)

    def is_over(self, step: int) -> bool:
        """Whether the run ends with this step, the last one that was counted."""
        train = self._settings.train
        return self._samples.used_up if train.epochs else step >= required(train.steps, "train.steps")

    def ends_epoch(self, every: int = 1) -> bool:
        """Whether an epoch has ended with the last step that was counted; one whose number is divisible by ``every``.

        An epoch is one pass over the training data; over a blend, as many samples as ``train.epochs: 1`` would read.
        """
        return self._samples.ends_epoch(every)

    @property
    def rows_are_from_files(self) -> bool:
        """Whether a loader reads the rows of the run, so that its place in the data can be set back by a step."""
        return bool(self._samples.sizes)

    def data_failure(self) -> UserError | None:
        """The error to raise if too many samples of a source are skipped (see ``DataErrors.failure``)."""
        return self._errors.failure()

    def record(self, line: Mapping[str, float | int | None], *, logged: bool) -> None:
        """Shows the line of a step on the terminal and, if ``logged``, writes it to metrics.jsonl and other logs.

        What such lines tell of reinforcement learning that goes wrong is said in words (see ``RlWarnings``).
        """
        if logged:
            self._metrics.write(line)
            self._wandb.log(line)
            self._tensorboard.log(line)
        self._progress.update(line)
        for warning in self._warnings.take(line) if logged else ():
            self.say(f"warning: {warning}")

    def record_start(self, fields: Mapping[str, float | int | None]) -> None:
        """Writes what was measured before the first step, if anything, as the line of step 0 to all logs."""
        if fields:
            line = {"step": 0, **fields}
            self._metrics.write(line)
            self._wandb.log(line)
            self._tensorboard.log(line)

    def record_rollouts(self, step: int, groups: Sequence[LoggedGroup]) -> None:
        """Writes sampled answers of a step to rollouts.jsonl and wandb. Only what rank 0 hands over counts."""
        self._wandb.log_rollouts(step, self._rollouts.write(step, groups))
        self.answers_of = step

    def record_experts(self, step: int, totals: ExpertTotals | None) -> dict[str, float | None]:
        """Keeps the load of a step's experts for the report; returns its fields for metrics.jsonl."""
        self._experts.put(step, totals)
        return expert_fields(totals)

    def finish(self, *, failed: bool = False) -> None:
        """Ends the wandb run; ``failed`` marks it as failed."""
        self._wandb.finish(exit_code=int(failed))
