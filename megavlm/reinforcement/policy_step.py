"""A step of reinforcement learning: sample a batch of answers, judge them, and learn from them in several updates."""

import itertools
import time
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.config.requirements import required
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.monitor.reward_failures import JudgedAnswer, RewardFailures
from megavlm.monitor.rollout_log import MAX_GROUPS, LoggedGroup
from megavlm.monitor.run_monitor import RunMonitor
from megavlm.platform.batch_invariant import batch_invariant
from megavlm.platform.collectives import broadcast_object, gather_objects
from megavlm.reinforcement.answer_rows import answer_rows, on_all_ranks
from megavlm.reinforcement.judged import Batch, Judged, failures_of, logged
from megavlm.reinforcement.policy_objective import Known, PolicyObjective
from megavlm.reinforcement.rollouts import Rollouts, in_mini_batches
from megavlm.runtime.feed import StepRows
from megavlm.runtime.kept_frames import can_keep, keeping, num_kept
from megavlm.runtime.routing import chosen_anew
from megavlm.runtime.session import Session
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step, StepResult

# Counts of work, which each update adds to; the other counts are those of the batch.
_WORK = (
    "tokens", "row_tokens", "target_tokens", "segment_squares", "patches", "frame_squares", "frames", "frames_encoded",
)  # fmt: skip


class PolicyStep:
    """Runs steps of reinforcement learning on all ranks; the training loop calls it like a ``Step``.

    Args:
        session: the session of the run.
        step: updates the weights.
        rollouts: makes batches of answers.
        objective: the objective of ``step``.
        renderer: packs rows, on leaders; None elsewhere.
        start: the reference model; None if the updates do not use it.
    """

    def __init__(
        self,
        session: Session,
        step: Step,
        rollouts: Rollouts,
        objective: PolicyObjective,
        renderer: Renderer | None,
        start: StartWeights | None,
    ):
        assert start is not None or not objective.options.beta, "a loss with a divergence needs the reference"
        self._session, self._step, self._rollouts, self._objective = session, step, rollouts, objective
        self._renderer, self._start = renderer, start
        self._judged: list[JudgedAnswer] = []  # of the last step on this data-parallel rank, on leaders
        self._logged: list[LoggedGroup] = []
        self._failures: RewardFailures | None = None  # on rank 0

    def __call__(self) -> StepResult:
        # vLLM encodes frames by itself, so there is nothing to share with it
        if self._session.settings.rollout.engine == "vllm":
            return self._sample_and_learn()
        with keeping(self._session.vlm):
            return self._sample_and_learn()

    def _sample_and_learn(self) -> StepResult:
        session, align = self._session, self._session.settings.align
        session.vlm.train(False)
        with self._step.phases("sampling"):
            batch = self._rollouts.collect()
        session.vlm.train()
        began = time.perf_counter()
        self._judged, self._logged = failures_of(batch.shown), [logged(group) for group in batch.shown[:MAX_GROUPS]]
        with batch_invariant(self._session.settings.rollout.batch_invariant):
            results = self._learn(batch)
        first = results[: len(results) // align.updates]
        good = [result for result in results if result.trouble is None]
        counts = _sums([result.counts for result in first]) | batch.counts
        counts |= _sums([{name: result.counts[name] for name in _WORK} for result in results])
        if len(good) < len(results) and good:
            batch.fields["skipped_updates"] = len(results) - len(good)
        done = good or results
        fields = merged(done, self._objective.max_names) | batch.fields
        if can_keep(session.vlm):
            fields["frames_kept"] = self._frames_kept()
        fields["seconds_update"] = time.perf_counter() - began
        return StepResult(
            sum(result.loss for result in done) / len(done),
            results[0].lr,
            {name: sum(result.norms[name] for result in done) / len(done) for name in done[0].norms},
            counts,
            fields,
            batch.skipped_samples,
            None if good else results[0].trouble,
        )

    def _frames_kept(self) -> int:
        """The number of frames whose hidden states were kept in this step, over all ranks."""
        kept = torch.tensor([num_kept(self._session.vlm)])
        dist.all_reduce(kept, group=self._session.groups.world_host)
        return int(kept.item())

    def _learn(self, batch: Batch) -> list[StepResult]:
        """Updates the weights with each mini-batch, as often as the settings say. Returns the results in order."""
        align, parts = self._session.settings.align, self._parts(batch)
        known = [self._known(rows) for rows in parts]
        results: list[StepResult] = []
        for update in range(align.updates):
            for rows, found in zip(parts, known, strict=True):
                self._objective.known = found
                is_last = update == align.updates - 1
                results.append(self._step.update(rows if is_last else rows.copy()))
                beat("an update of the weights")
        self._objective.known = []
        return results

    def _parts(self, batch: Batch) -> list[StepRows]:
        """The rows of each mini-batch; if nothing can be learned, those of one update that changes nothing."""
        cut = in_mini_batches(batch.groups, self._session.settings.align.mini_batches)
        parts = [rows for groups in cut if (rows := self._rows(groups)) is not None]
        if not parts:
            rows = self._rows([], filled=True)
            assert rows is not None, "rows were asked for"
            parts = [rows]
        for rows in parts:
            rows.encoded = []  # a frozen tower encodes the frames of each mini-batch once for all passes
        return parts

    def report(self, step: int, monitor: RunMonitor) -> UserError | None:
        """Records answers and failed rewards; see ``MethodStep``. An error if too many rewards fail."""
        session, settings = self._session, self._session.settings
        judged = gather_objects(self._judged, session.groups.world_host)
        if not session.is_first:
            return broadcast_object(None, session.groups.world_host)
        if self._failures is None:
            output, limit = required(settings.output, "output"), settings.reward_pool.max_failed_fraction
            self._failures = RewardFailures(output, step - 1, limit, monitor.say)
            for remark in self._rollouts.remarks():
                monitor.say(remark)
        self._failures.take(step, itertools.chain.from_iterable(judged))
        if step % settings.rollout.log_every == 0 or step in (1, settings.train.steps):
            monitor.record_rollouts(step, self._logged)
        return broadcast_object(self._failures.failure(), session.groups.world_host)

    def close(self) -> None:
        """Ends the engine and the processes of the rewards."""
        self._rollouts.close()

    def _rows(self, groups: Sequence[Judged], *, filled: bool = False) -> StepRows | None:
        """Packs groups into rows, as many on each data-parallel rank. Call it on all ranks.

        It returns None if no rank has an answer, unless ``filled`` asks for rows without any.
        """
        settings, rows = self._session.settings, list[Row]()
        if self._renderer is not None:
            mask, most = settings.align.mask_truncated, settings.data.max_patches_per_row
            rows = answer_rows([group.group for group in groups], self._renderer, most, mask_truncated=mask)
        return on_all_ranks(rows, self._renderer, self._session.vlm, settings.vision.window, filled=filled)

    @property
    def _needs_old(self) -> bool:
        """Whether the weights change before all answers are learned from; otherwise, the update itself computes it."""
        align = self._session.settings.align
        return align.updates * align.mini_batches > 1

    def _known(self, rows: StepRows) -> list[Known]:
        """Computes what the loss needs beside the log-probabilities of each update, for each row."""
        look = partial(self._step.look_through, rows)
        old: list[torch.Tensor] = []
        reference: list[torch.Tensor] = []
        with self._step.phases("reference"):
            if self._needs_old:
                self._session.vlm.train(False)
                old = look(self._objective.logprobs)
                self._session.vlm.train()
            if self._start is not None:
                with self._start(), chosen_anew():
                    reference = look(self._objective.logprobs)
        count = max(len(old), len(reference))
        return [Known(old[n] if old else None, reference[n] if reference else None) for n in range(count)]


def _sums(many: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(values[name] for values in many) for name in many[0]}


def merged(results: Sequence[StepResult], largest: Sequence[str]) -> dict[str, float | None]:
    """The mean of each field over the target tokens of the updates, or the largest value of those that are named."""
    merged: dict[str, float | None] = {}
    for name in results[0].fields:
        known = [(value, r.counts["target_tokens"]) for r in results if (value := r.fields[name]) is not None]
        tokens = sum(count for _, count in known)
        if name in largest:
            merged[name] = max(value for value, _ in known) if tokens else None
        else:
            merged[name] = sum(value * count for value, count in known) / tokens if tokens else None
    return merged
