"""One batch of reinforcement learning: prompts, sampled answers, their rewards and advantages."""

import math
import time
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

from megavlm.align.loss_tables import GAE
from megavlm.align.losses import advantages
from megavlm.align.sampling_checks import too_few_prompts, uncorrected
from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.config.environment_section import ENVIRONMENT
from megavlm.config.requirements import required
from megavlm.reinforcement.answer_queue import AnswerQueue, Asked
from megavlm.reinforcement.answer_rows import AnswerGroup
from megavlm.reinforcement.batch_fields import Sums, add_batch, counts_of, environment_fields, fields_of, keys_of
from megavlm.reinforcement.divergence import Divergence
from megavlm.reinforcement.judged import Batch, Judged, with_environment, with_models
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.rewards.score import Score, overlong_penalty
from megavlm.rollout.conversations import Conversations
from megavlm.rollout.engine import Answered
from megavlm.runtime.session import Session
from megavlm.training.step import raise_everywhere

KL = "kl"  # the divergence among the parts of a reward
_SECONDS_BETWEEN_SIGNS = 1.0  # of life, while rewards are awaited


class Rollouts:
    """Makes batches. Create it on all ranks.

    Args:
        session: the session of the run.
        queue: has prompts answered, and knows the rewards.
        models: the reward models among the rewards.
        divergence: the divergence from the reference model, if it is a part of the rewards.
        advantage: the name of the advantage, and its options.
        replacements: how many times flat groups are replaced in a step.
    """

    def __init__(
        self,
        session: Session,
        queue: AnswerQueue,
        models: RewardModels,
        divergence: Divergence | None,
        advantage: tuple[str, dict[str, float]],
        replacements: int,
    ):
        self._session, self._queue = session, queue
        self._collected = time.perf_counter()  # when the last batch was complete
        self._scores: dict[Hashable, list[Score]] = {}  # of answers that were not yet taken, by the prompt's number
        self._advantage, self._replacements = advantage, replacements
        self._models, self._divergence = models, divergence
        self._weights = {reward.key: reward.weight for reward in session.settings.reward}
        self._speaks = session.settings.environment.python is not None
        if self._speaks:
            self._weights[ENVIRONMENT] = session.settings.environment.weight
        self._names = session.settings.data.source_names

    def collect(self) -> Batch:
        """Samples and judges the next batch. Call it on all ranks.

        Groups from which nothing can be learned are replaced by new prompts if the settings say so: first those that
        are missing are counted over all ranks, then as many prompts are sampled, and all of their answers are awaited.
        So no answer is left out for its length.

        Raises:
            NoRows: on all ranks, if a rank has no prompts, or its answers cannot be sampled.
            StepLeft: on all ranks, if a run is asked to stop on one of them while it samples.
            UserError: on all ranks, if too many rewards fail.
        """
        settings = self._session.settings.rollout
        wanted, size = required(settings.prompts, "rollout.prompts"), self._session.groups.dp_size
        batch, sums, missing = Batch(), Sums(float), float(wanted)
        sums["seconds_sync"] = self._queue.begin_step()
        for attempt in range(1 + self._replacements):
            judged = self._judged(self._taken(math.ceil(missing / size), batch, sums), sums)
            batch.shown += judged
            keep_flat = self._replacements == 0
            batch.groups += [group for group in judged if keep_flat or not group.is_flat]
            if self._replacements == 0 or attempt == self._replacements:
                break
            missing = wanted - self._sum({"groups": len(batch.groups)})["groups"]
            if missing <= 0:
                break
        now = time.perf_counter()
        sums["seconds_sampling"] = now - self._collected if settings.ahead else sums["seconds_rollout"]
        self._collected = now
        self._count(batch, sums)
        return batch

    def remarks(self) -> list[str]:
        """What the user should know of the prompts; on leaders, which read them."""
        loader, settings = self._queue.loader, self._session.settings
        if loader is None:
            return []
        return [
            *too_few_prompts(settings, sum(len(source.file) for source in loader.sources)),
            *uncorrected(settings),
        ]

    def close(self) -> None:
        """Ends the engine and the processes of the rewards."""
        self._queue.close()

    def _taken(self, count: int, batch: Batch, sums: Sums) -> list[Asked]:
        """The next prompts of this data-parallel rank with their answers, on leaders; elsewhere []."""
        began = time.perf_counter()
        taken = self._queue.take(count)
        for one in taken:
            batch.skipped_samples += one.skipped_samples
            for name, new in zip(self._names, one.newly_read, strict=True):
                sums[f"newly_read/{name}"] += new
            for source in (one.source_id, *(skipped.source_id for skipped in one.skipped_samples)):
                sums[f"used/{self._names[source]}"] += 1
            sums["staleness"] += self._queue.version - one.version
        sums["seconds_rollout"] += time.perf_counter() - began
        return taken

    def _judged(self, asked: list[Asked], sums: Sums) -> list[Judged]:
        began, judged = time.perf_counter(), list[Judged]()
        problem: UserError | None = None
        rewards = self._queue.rewards
        if rewards is not None:
            try:
                while any(one.number not in self._scores for one in asked):  # not for ever: rewards have time-outs
                    self._scores |= dict(rewards.results(_SECONDS_BETWEEN_SIGNS))
                    beat("the rewards")
            except UserError as error:
                problem = error
        raise_everywhere(problem, problem is not None, self._session.groups)
        answered = [one.answered for one in asked if one.answered is not None]
        groups = [AnswerGroup(one.prompt.sample, one.answers, [0.0] * len(one.answers)) for one in answered]
        of_models = self._models.scores(groups)
        divergences = self._divergence.parts(groups) if self._divergence is not None else []
        first = 0
        for one_asked, group in zip(asked, answered, strict=True):
            scores = self._scores.pop(one_asked.number)
            for number, one in enumerate(scores):
                scores[number] = with_models(
                    one, {name: values[first + number] for name, values in of_models.items()}, self._weights
                )
                if self._speaks:
                    scores[number] = with_environment(scores[number], group.answers[number], self._weights)
                if self._divergence is not None:
                    scores[number] = _with_kl(scores[number], divergences[first + number], self._divergence.weight)
            judged.append(self._judge(group, scores))
            first += len(scores)
        sums["seconds_reward"] += time.perf_counter() - began
        return judged

    def _judge(self, answered: Answered, scores: list[Score]) -> Judged:
        cache, most = self._session.settings.align.overlong_cache, self._queue.sampling.max_new_tokens
        rewards: list[float | None] = []
        for answer, found in zip(answered.answers, scores, strict=True):
            late = overlong_penalty(len(answer.tokens), most, cache) if cache is not None else 0.0
            rewards.append(None if found.total is None else found.total + late)
        known = torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float64)
        name, options = self._advantage
        of_tokens = name == GAE
        of_answers = known.nan_to_num() if of_tokens else advantages(name, known, len(rewards), **options)
        texts = self._queue.texts(answered, special=True)
        return Judged(answered, texts, scores, rewards, of_answers.tolist(), of_tokens)

    def _count(self, batch: Batch, sums: Sums) -> None:
        """Fills ``fields`` and ``counts`` with sums over all ranks."""
        rewards = [*self._weights, *([KL] if self._divergence is not None else [])]
        add_batch(sums, batch, rewards)
        if isinstance(self._queue.engine, Conversations):
            sums["seconds_environment"] += self._queue.engine.take_seconds()
        is_leader = self._queue.loader is not None
        found = self._sum({key: sums[key] if is_leader else 0.0 for key in keys_of(rewards, self._names)})
        batch.fields = fields_of(found, rewards, self._session.groups.dp_size)
        if self._speaks:
            batch.fields |= environment_fields(found, self._session.groups.dp_size)
        batch.counts = counts_of(found)

    def _sum(self, values: dict[str, float]) -> Sums:
        """The sums of the values over all ranks."""
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums, group=self._session.groups.world_host)
        return Sums(float, zip(values, sums.tolist(), strict=True))


def in_mini_batches(groups: Sequence[Judged], count: int) -> list[list[Judged]]:
    """Divides groups into ``count`` parts that differ by at most one group; each keeps their order."""
    return [list(groups[n * len(groups) // count : (n + 1) * len(groups) // count]) for n in range(count)]


def _with_kl(found: Score, part: float, weight: float) -> Score:
    """A score with the divergence as a further part. An answer without a reward still has none."""
    parts = {**found.parts, KL: part if math.isfinite(part) else None}
    if found.total is None or not math.isfinite(part):
        failures = [] if math.isfinite(part) else [f"{KL}: it is {part}"]
        return Score(None, parts, [*found.failures, *failures])
    return Score(found.total + weight * part, parts, found.failures)
