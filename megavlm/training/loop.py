"""The training loop: it runs the steps, writes checkpoints and metrics, and ends the run."""

import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megavlm.base import stop_signals
from megavlm.config.requirements import required
from megavlm.config.settings import CheckpointSettings, Settings
from megavlm.monitor.hang_watch import HangWatch
from megavlm.monitor.run_monitor import RunMonitor
from megavlm.output.folder import StartOptions
from megavlm.output.lock import RunLock
from megavlm.training.hooks import Hook, call_all
from megavlm.training.memory_check import check_memory
from megavlm.training.method import Method
from megavlm.training.run import Run, build_run
from megavlm.training.skipped_steps import SkippedSteps
from megavlm.training.step import NoRows, StepResult
from megavlm.training.stop_signal import StopSignal
from megavlm.training.summary import header, metrics_line


def train(
    settings: Settings,
    method: Method,
    hooks: Sequence[Hook] = (),
    options: StartOptions = StartOptions(),  # noqa: B008 (immutable)
) -> int:
    """Trains until ``train.steps`` or ``train.epochs``. If the output folder contains the run already, it is resumed.

    Args:
        settings: the settings of the run.
        method: the training method.
        hooks: additional work after steps and at the end.
        options: how to treat a run that is in the output folder already.

    Returns:
        Exit status 0, also if a signal stopped the run after a checkpoint.

    Raises:
        UserError: the longest row does not fit in memory, or the settings, data or checkpoints do not fit.
        RunFailure: too many consecutive steps were skipped, weights are not finite, or too many samples are broken.
    """
    lock = RunLock(required(settings.output, "output"))
    with stop_signals.watched() as signals, HangWatch.of_run(settings) as watch, lock:
        run = build_run(settings, method, lock, options, watch.heartbeat)
        session, settings = run.session, run.session.settings
        shown = settings, run.title, header(session, run.loader), run.first_step, session.groups, run.loader
        with RunMonitor(*shown, is_first=session.is_first) as monitor:
            signals.speak = monitor.say
            stop = StopSignal(session.groups.world_host, signals, settings.checkpoint.minutes)
            try:
                last, ending = _run_steps(run, stop, hooks, monitor, watch.heartbeat)
            except BaseException:
                run.abandon()
                raise
            run.checkpoints.finish()
            if last:  # otherwise, the first step was left
                _at_end(run, last, hooks, monitor)
            monitor.tell_samples()
            monitor.say(ending)
            monitor.finish()
        run.close()
        dist.barrier(run.session.groups.world_host)
    return 0


def _run_steps(
    run: Run, stop: StopSignal, hooks: Sequence[Hook], monitor: RunMonitor, heartbeat: Callable[[str], None]
) -> tuple[int, str]:
    """Runs the remaining steps. Returns the number of the last step, and why the run ends with it."""
    settings = run.session.settings
    steps, number = required(settings.train.steps, "train.steps"), run.first_step
    for remark in run.remarks:
        monitor.say(remark)
    is_over = monitor.is_over(number)
    if is_over:
        done, longer = ("epochs", "epochs") if settings.train.epochs else (f"{steps} steps", "steps")
        monitor.say(f"all {done} of this run are done already; with a larger train.{longer} it goes on")
    if failure := monitor.data_failure():  # an earlier start ended for its data, which are still as they were
        monitor.finish(failed=True)
        raise failure
    if not is_over and (early := run.best.ending(number)):
        monitor.say("eval.stop_after has ended this run already; with a larger value, or null, it goes on")
        return number, early
    if settings.train.memory_check and not is_over:
        monitor.say(check_memory([run.step, *run.others.values()], run.longest_row, settings))
        heartbeat("the memory check")
    for prepare in (hook.prepare for hook in hooks if hook.prepare is not None and not is_over):
        prepare(run)
        heartbeat("preparing for the steps")
    if number == 0 and (at_start := [hook for hook in hooks if hook.at_start]):
        fields, unmeasured = call_all(at_start, run, 0, monitor.say)
        if unmeasured is not None:
            raise unmeasured
        monitor.record_start(fields)
        heartbeat("the work before the first step")
    skipped = SkippedSteps(settings.train.max_skipped_steps, monitor.say)
    saved = run.first_step
    stop.begin()
    while not is_over:
        number += 1
        thawed = run.optimizers.unfreeze(number)
        for part in thawed:
            monitor.say(f"step {number}: {part} is unfrozen and trained from now on")
        stop.begin_step(may_leave=not thawed)  # else the state of the step before could not be saved any more
        try:
            result, problem = _one_step(run, number, hooks, monitor)
        except NoRows:
            if number - 1 > saved and not thawed and monitor.rows_are_from_files:
                _save_before(run, number)
            run.checkpoints.finish()
            monitor.finish(failed=True)
            raise
        except stop_signals.StepLeft:
            unsaved = _save_before(run, number) if number - 1 > saved else None
            if unsaved is not None:
                run.checkpoints.finish()
                monitor.finish(failed=True)
                raise unsaved from None
            return number - 1, f"stopped at step {number - 1}; step {number} begins again when the run continues"
        is_over = monitor.is_over(number)
        run.checkpoints.poll()
        heartbeat(f"step {number}")
        stopping, due = stop.decide()
        due = due or _is_due(settings.checkpoint, number, monitor)
        data_failure = monitor.data_failure() or run.report(number, monitor) or problem
        for hook in (hook for hook in hooks if hook.at_answers and monitor.answers_of == number):
            hook.call(run, number, monitor.say)
        early, is_best = run.best.ending(number), run.best.step == number
        saving = is_over or stopping or due or is_best or early is not None or data_failure is not None
        failure = skipped.failure(number, result.trouble)
        if result.trouble and saving and not failure:
            failure = run.weights_failure()  # a bad checkpoint would replace an older, good one
        if saving and not failure:  # also if the data end the run: with other data or limits, it continues from here
            with run.phases.named("checkpoint"):
                run.checkpoints.save(number, best=run.best.step)
            saved = number
            stop.saved()
            for hook in (hook for hook in hooks if hook.at_checkpoint):
                hook.call(run, number, monitor.say)
            heartbeat(f"the checkpoint of step {number}")
        if (ending := failure or data_failure) is not None:
            run.checkpoints.finish()  # a checkpoint may still be in progress
            _at_end(run, number, hooks, monitor)
            monitor.finish(failed=True)
            raise ending
        if not is_over and (stopping or early is not None):
            return number, early or f"stopped at step {number}"
    return number, f"done at step {number}"


def _is_due(when: CheckpointSettings, number: int, monitor: RunMonitor) -> bool:
    """Whether a checkpoint is due after step ``number`` because of the number of steps or epochs."""
    steps, epochs = when.every, when.every_epochs
    return bool((steps and number % steps == 0) or (epochs and monitor.ends_epoch(epochs)))


def _at_end(run: Run, number: int, hooks: Sequence[Hook], monitor: RunMonitor) -> None:
    """Runs the hooks that are due at the end of a run, also if it ends because of its data, rewards or weights."""
    for hook in hooks:
        if hook.at_end:
            hook.call(run, number, monitor.say)


def _save_before(run: Run, number: int) -> Exception | None:
    """Writes the checkpoint of the step before ``number``, which cannot be done now or is left, if there is no failure.

    Returns the failure if not all weights are finite.
    """
    if run.loader is not None:
        run.loader.rewind()
    failure = run.weights_failure()
    if failure is None:
        run.checkpoints.save(number - 1)
    return failure


def _one_step(run: Run, number: int, hooks: Sequence[Hook], monitor: RunMonitor) -> tuple[StepResult, Exception | None]:
    """Runs step ``number`` and the hooks that are due after it, and records its line of metrics.

    Returns:
        The result, and the error of a hook, after which the run ends with a checkpoint of the step.
    """
    settings = run.session.settings
    with run.profile.step(number):
        began = time.perf_counter()
        run.stragglers.start()
        run.step.expert_load.start()
        result = run.take_step(number, is_last=number == settings.train.steps and not settings.train.epochs)
        seconds = time.perf_counter() - began
    line = {
        **metrics_line(run.session, number, result, seconds),
        **monitor.count_samples(number, result.counts, result.skipped_samples),
    }
    is_last = monitor.is_over(number)
    due = [hook for hook in hooks if hook.is_due(number, monitor.ends_epoch, is_last=is_last)]
    if due:
        run.step.optimizers.wait_for_weights()
    fields, problem = call_all(due, run, number, monitor.say)
    line |= fields
    logged = number % settings.log.every == 0 or is_last or bool(result.trouble or due)
    if logged:
        line |= run.stragglers.fields() | monitor.record_experts(number, run.step.expert_load.totals())
        line |= {"seconds_checkpoint": run.checkpoints.take_seconds(), **run.phases.fields()}
    monitor.record(line, logged=logged)
    run.best.take(line)
    if run.best.step == number:
        monitor.say(f"step {number} has the best {run.best.told()} so far")
    return result, problem
