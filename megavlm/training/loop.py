"""A training run: from settings to checkpoints, metrics and a report. Pretraining and tuning differ in data alone."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist

from megavlm.base.number_format import short
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.manager import Checkpoints
from megavlm.config.run_folder import prepare_output
from megavlm.config.settings import Settings
from megavlm.data.loader import build_loader
from megavlm.data.records import Kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.data.sources import Source
from megavlm.model.flops import Work, peak_flops, step_flops
from megavlm.model.vlm import PARTS
from megavlm.monitor.data_errors import DataErrors
from megavlm.monitor.hang_watch import HangWatch
from megavlm.monitor.metrics import MetricsWriter, throughput
from megavlm.monitor.progress import Progress
from megavlm.monitor.stragglers import Stragglers
from megavlm.monitor.wandb_log import WandbLog
from megavlm.optim.optimizers import Optimizers
from megavlm.platform import device_name, memory_gib, on_gpu
from megavlm.report.loss_plot import write_loss_plot
from megavlm.report.run_report import write_report
from megavlm.runtime.adapter_start import load_start
from megavlm.runtime.feed import Feed
from megavlm.runtime.session import Session, start
from megavlm.training.memory_check import check_memory
from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL, Objective
from megavlm.training.skipped_steps import SkippedSteps, weights_failure
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step, StepResult


class Method(Protocol):
    """What training learns from its samples.

    Attributes:
        kind: how records are rendered. title: heading on the terminal. scores: whether the model has a reward head.
    """

    kind: Kind
    title: str
    scores: bool

    def bare_objective(self, session: Session) -> Objective:
        """What is minimised, without what it learns from the data beforehand."""

    def objective(
        self,
        session: Session,
        renderer: Renderer | None,
        sources: list[Source] | None,
        heartbeat: Callable[[str], None],
    ) -> Objective:
        """The same, ready to be used. Called on all ranks, before the optimizer is built and a checkpoint restored.

        ``renderer`` and ``sources`` are there on leaders; ``heartbeat`` is to be called at every sign of progress. It
        may leave other weights behind than it found, if those are the ones of ``model.load``.
        """

    def rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows with what the objective needs beside them; called on leaders, after ``objective``."""


class LanguageModeling:
    """Targets are to become likelier: pretraining ("pretrain") and supervised tuning ("tune")."""

    def __init__(self, kind: Kind, title: str):
        self.kind, self.title, self.scores = kind, title, False

    def bare_objective(self, session: Session) -> CrossEntropy:
        settings = session.settings
        names = [source.label for source in settings.data.leaves.values()]
        return CrossEntropy(names, settings.train.logprob_chunk_tokens)

    def objective(
        self,
        session: Session,
        renderer: Renderer | None,
        sources: list[Source] | None,
        heartbeat: Callable[[str], None],
    ) -> Objective:
        bare, coefficient = self.bare_objective(session), session.settings.train.kl_to_start
        if not coefficient:
            return bare
        return CrossEntropyWithKL(bare.source_names, bare.chunk_tokens, coefficient, StartWeights(session))

    def rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        return rows


def train(settings: Settings, method: Method) -> int:
    """Trains to ``train.steps``, or continues the run that stands in the output folder.

    Returns:
        exit status 0, also when a signal stopped the run after a checkpoint.
    Raises:
        UserError: the longest row does not fit in memory. RunFailure: too many skipped steps in a row.
    """
    with HangWatch.of_run(settings) as watch:
        return _train(settings, method, watch)


def _train(settings: Settings, method: Method, watch: HangWatch) -> int:
    session = start(settings, training=True, load=False, score_head=method.scores)
    given, settings = settings, session.settings  # the latter with the section that ``model.adapter`` is of
    watch.heartbeat("building the model")
    groups, output = session.groups, settings.output
    resuming = _from_first_rank(session, lambda: prepare_output(given))
    checkpoint = _from_first_rank(session, lambda: latest(output / "checkpoints")) if resuming else None

    origin = None
    if checkpoint is None or session.vlm.tuning is not None:  # whose checkpoints lack what does not learn
        load_start(settings, session.vlm)
        origin = find_checkpoint(settings.model.load) if settings.model.load is not None else None
        watch.heartbeat("loading the weights")
    loader = renderer = None
    if groups.is_leader:
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        loader = build_loader(
            settings.data,
            renderer,
            method.kind,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            seed=settings.train.seed,
            rows_per_step=settings.train.global_batch_size // groups.dp_size,
            pin_memory=on_gpu(),
        )
    objective = method.objective(session, renderer, loader.sources if loader is not None else None, watch.heartbeat)
    watch.heartbeat("preparing the method")
    optimizers = Optimizers(session.vlm, settings.train)
    checkpoints = Checkpoints(output / "checkpoints", session.vlm, optimizers, loader, settings, origin)
    first = checkpoints.restore(checkpoint) if checkpoint else 0
    watch.heartbeat("building the optimizer and restoring the run")
    stragglers = Stragglers(session.vlm)
    names = [source.label for source in settings.data.leaves.values()]
    step = Step(
        session.vlm,
        optimizers,
        Feed(session.vlm, method.rows(stragglers.rows(iter(loader))) if loader is not None else None),
        settings.train.global_batch_size // groups.dp_size,
        objective,
        settings.vision.window,
        names,
    )
    stop = _StopSignal(session)
    steps, every = settings.train.steps, settings.checkpoint.every
    with (
        Progress(steps, first, method.title, _header(session), enabled=session.is_first) as progress,
        MetricsWriter(output, first, enabled=session.is_first) as metrics,
    ):
        errors = DataErrors(output, first, step.source_names, settings.data.max_bad_fraction, groups, progress.say)
        wandb = WandbLog(settings, enabled=session.is_first, warn=progress.say)
        if checkpoint is None and resuming:
            progress.say("no checkpoint yet: starts at step 0")
        if settings.train.memory_check and first < steps:
            progress.say(check_memory(step, renderer, settings, method.kind))
            watch.heartbeat("the memory check")
        skipped = SkippedSteps(settings.train.max_skipped_steps, progress.say)
        number, stopping = first, False
        for number in range(first + 1, steps + 1):
            for part in optimizers.unfreeze(number):
                progress.say(f"step {number}: {part} is unfrozen and trained from here on")
            began = time.perf_counter()
            stragglers.start()
            result = step()
            line = {
                **_line(session, number, result, began),
                **errors.take(number, result.counts, result.skipped_samples),
            }
            if number % settings.log.every == 0 or number == steps or result.trouble:
                line |= {**stragglers.fields(), "seconds_checkpoint": checkpoints.take_seconds()}
                metrics.write(line)
                wandb.log(line)
            progress.update(line)
            checkpoints.poll()
            watch.heartbeat(f"step {number}")
            stopping = stop.asked()
            saving = number == steps or stopping or bool(every and number % every == 0)
            failure = skipped.failure(number, result.trouble) or errors.failure()
            if result.trouble and saving and not failure:
                failure = weights_failure(session.vlm)  # it would take the place of an older, good checkpoint
            if failure:
                checkpoints.finish()  # an earlier one may still be in the making
                wandb.finish(exit_code=1)
                raise failure
            if saving:
                checkpoints.save(number)
                watch.heartbeat(f"the checkpoint of step {number}")
            if stopping:
                break
        checkpoints.finish()
        if session.is_first:
            metrics.close()
            try:
                write_loss_plot(output)
                write_report(output)
            except Exception as error:  # the run itself is whole
                progress.say(f"no report: {error}")
            ending = f"stopped at step {number}" if stopping and number < steps else f"done: {steps} steps"
            progress.say(f"{ending} · {output / 'report.html'}")
        wandb.finish()
    dist.barrier()
    return 0


def _from_first_rank(session: Session, call):
    """The result of ``call`` on rank 0, on every rank; an exception there is raised everywhere."""
    box = [None, None]
    if session.is_first:
        try:
            box[0] = call()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=session.groups.world_host)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _line(session: Session, number: int, result: StepResult, began: float) -> dict:
    """A line of metrics.jsonl."""
    counts, settings = result.counts, session.settings
    peak = peak_flops(device_name())
    adapted = session.vlm.tuning.parts if session.vlm.tuning is not None else ()
    flops = step_flops(session.shapes, Work.from_counts(counts), settings.frozen(number), adapted)
    whole = {
        name: int(counts[name])
        for name in ("tokens", "target_tokens", "images", "videos", "samples", "frames", "frames_encoded")
    }
    names = [source.label for source in settings.data.leaves.values()]
    per_source = [f"{kind}/{name}" for name in names for kind in ("samples", "target_tokens") if len(names) > 1]
    return {
        "step": number,
        "loss": result.loss,
        "skipped": int(result.trouble is not None),
        "lr": result.lr,
        **result.norms,
        **whole,
        **result.fields,
        **{name: int(counts[name]) for name in per_source},
        **throughput(
            counts["tokens"], counts["row_tokens"], time.perf_counter() - began, flops, dist.get_world_size(), peak
        ),
        "memory_gib": memory_gib(),
    }


def _header(session: Session) -> dict[str, str]:
    settings, vlm = session.settings, session.vlm
    parallel = settings.parallel
    layout = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "data": session.groups.dp_size,
    }
    cut = parallel.tensor * parallel.pipeline * parallel.expert > 1
    share = " (on the first process)" if cut else ""
    return {
        "model": f"{settings.model.hf} · {vlm.kernels} kernels · {settings.train.precision}",
        "learns": " · ".join(f"{part} {_learning(session, part)}" for part in PARTS) + share,
        "layout": " × ".join(f"{name} {size}" for name, size in layout.items() if size > 1) or "one process",
        "data": ", ".join(str(source.path) for source in settings.data.leaves.values()),
        "rows": f"{settings.train.global_batch_size} a step, {settings.data.seq_length} tokens each",
        "output": str(settings.output),
    }


def _learning(session: Session, part: str) -> str:
    """How many weights of a part learn on this rank, and from when on."""
    weights = [p for module in session.vlm.modules_of(part) for p in module.parameters()]
    learning, after = (
        sum(p.numel() for p in weights if p.requires_grad),
        session.settings.train.unfreeze_after.get(part),
    )
    if learning or after is None:
        return short(learning) if learning else "frozen"
    return f"{short(sum(p.numel() for p in weights))} from step {after + 1} on"


class _StopSignal:
    """SIGTERM or SIGUSR1 (SLURM's warning before the limit) asks all ranks to save and leave after the current step."""

    def __init__(self, session: Session):
        self._group, self._asked = session.groups.world_host, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether any rank was asked; the same answer on all of them."""
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
