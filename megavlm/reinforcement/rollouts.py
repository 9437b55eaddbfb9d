"""One batch of reinforcement learning: prompts, sampled answers, their rewards and advantages."""

import math
import time
from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.distributed as dist

from megavlm.align.losses import advantages
from megavlm.align.sampling_checks import too_few_prompts
from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.config.requirements import required
from megavlm.data.answers import first_sample
from megavlm.data.loader import RowLoader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.reinforcement.answer_rows import AnswerGroup
from megavlm.reinforcement.batch_fields import Sums, add_batch, counts_of, fields_of, keys_of
from megavlm.reinforcement.divergence import Divergence
from megavlm.reinforcement.judged import Batch, Judged, asked_of
from megavlm.reinforcement.policy import GAE
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.rewards.pool import RewardPool
from megavlm.rewards.score import Score, columns_of, overlong_penalty, score
from megavlm.rollout.engine import Answered, Engine, Prompt, Sampling
from megavlm.rollout.sampling import mixed_seed
from megavlm.runtime.session import Session
from megavlm.training.step import NoRows, raise_everywhere

KL = "kl"  # the divergence among the parts of a reward
_SECONDS_BETWEEN_SIGNS = 1.0  # of life, while rewards are awaited


class Rollouts:
    """Makes batches. Create it on all ranks.

    Args:
        session: the session of the run.
        engine: samples the answers.
        sampling: how it samples.
        renderer: decodes the answers on the leader of each model-parallel group; None elsewhere.
        loader: the loader of the prompts, on the same ranks.
        rows: the rows of that loader, one prompt each.
        rewards: judges the answers, on the same ranks.
        models: the reward models among the rewards.
        divergence: the divergence from the reference model, if it is a part of the rewards.
        advantage: the name of the advantage, and its options.
        replacements: how many times flat groups are replaced in a step.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        sampling: Sampling,
        renderer: Renderer | None,
        loader: RowLoader | None,
        rows: Iterator[Row] | None,
        rewards: RewardPool | None,
        models: RewardModels,
        divergence: Divergence | None,
        advantage: tuple[str, dict[str, float]],
        replacements: int,
    ):
        self._session, self._engine, self._sampling, self._renderer = session, engine, sampling, renderer
        self._loader, self._rows, self._rewards = loader, rows, rewards
        self._advantage, self._replacements = advantage, replacements
        self._models, self._divergence = models, divergence
        self._weights = {reward.key: reward.weight for reward in session.settings.reward}
        self._names = session.settings.data.source_names

    def collect(self) -> Batch:
        """Samples and judges the next batch. Call it on all ranks.

        Groups from which nothing can be learned are replaced by new prompts if the settings say so: first those that
        are missing are counted over all ranks, then as many prompts are sampled, and all of their answers are awaited.
        So no answer is left out for its length.

        Raises:
            NoRows: on all ranks, if a rank has no prompts.
            UserError: on all ranks, if too many rewards fail.
        """
        settings = self._session.settings.rollout
        wanted, size = required(settings.prompts, "rollout.prompts"), self._session.groups.dp_size
        batch, sums, missing = Batch(), Sums(float), float(wanted)
        if self._loader is not None:
            self._loader.begin_step()
        for attempt in range(1 + self._replacements):
            judged = self._judged(self._answered(math.ceil(missing / size), batch, sums), sums)
            batch.shown += judged
            keep_flat = self._replacements == 0
            batch.groups += [group for group in judged if keep_flat or not group.is_flat]
            if self._replacements == 0 or attempt == self._replacements:
                break
            missing = wanted - self._sum({"groups": len(batch.groups)})["groups"]
            if missing <= 0:
                break
        self._count(batch, sums)
        return batch

    def remarks(self) -> list[str]:
        """What the user should know of the prompts; on leaders, which read them."""
        if self._loader is None:
            return []
        return too_few_prompts(self._session.settings, sum(len(source.file) for source in self._loader.sources))

    def close(self) -> None:
        """Ends the engine and the processes of the rewards."""
        self._engine.close()
        if self._rewards is not None:
            self._rewards.close()

    def _prompts(self, count: int, places: dict[int, int], batch: Batch, sums: Sums) -> Iterator[Prompt]:
        """The next prompts of this data-parallel rank, read while others are answered.

        ``places`` gets the place of each by its id. Raises UserError if there are none.
        """
        assert self._loader is not None, "leaders have prompts"
        assert self._rows is not None, "leaders have prompts"
        groups, settings = self._session.groups, self._session.settings
        for place in range(count):
            number = self._loader.next_number(groups.dp_rank)
            row = next(self._rows)
            batch.skipped_samples += row.skipped_samples
            for name, new in zip(self._names, row.newly_read, strict=True):
                sums[f"newly_read/{name}"] += new
            for source in (row.source_ids[0], *(skipped.source_id for skipped in row.skipped_samples)):
                sums[f"used/{self._names[source]}"] += 1
            size = required(settings.rollout.group_size, "rollout.group_size")  # see ``with_group_size``
            seeds = tuple(mixed_seed(settings.train.seed, number, n) for n in range(size))
            prompt = Prompt(first_sample(row), seeds)
            places[id(prompt)] = place
            yield prompt

    def _answered(self, count: int, batch: Batch, sums: Sums) -> list[Answered]:
        """Samples, and gives each group to the rewards as soon as it is complete. Returns the groups in order."""
        began, is_leader, places = time.perf_counter(), self._loader is not None, dict[int, int]()
        done: dict[int, Answered] = {}
        prompts = self._prompts(count, places, batch, sums) if is_leader else None
        try:
            for answered in self._engine.generate(prompts, self._sampling):
                place = places[id(answered.prompt)]
                done[place] = answered
                assert self._rewards is not None, "answers arrive on leaders, which have rewards"
                asked, texts = asked_of(answered), self._texts(answered)
                columns = {"answer": asked.reference, **asked.columns} if asked.reference is not None else asked.columns
                self._rewards.submit(place, texts, columns_of(columns, asked.question, len(texts)))
        except UserError as error:  # the engine raises it on all ranks
            raise NoRows(error) from error
        sums["seconds_rollout"] += time.perf_counter() - began
        assert len(done) == count * is_leader, "the engine answers every prompt"
        return [done[place] for place in sorted(done)]

    def _texts(self, answered: Answered, *, special: bool = False) -> list[str]:
        tokens = [answer.tokens for answer in answered.answers]
        assert self._renderer is not None, "answers arrive on leaders"
        return self._renderer.tokenizer.batch_decode(tokens, skip_special_tokens=not special)

    def _judged(self, answered: list[Answered], sums: Sums) -> list[Judged]:
        began, found, judged = time.perf_counter(), dict[Hashable, list[Score]](), list[Judged]()
        problem: UserError | None = None
        if self._rewards is not None:
            try:
                while self._rewards.pending:  # not for ever: each reward has a time-out
                    found |= dict(self._rewards.results(_SECONDS_BETWEEN_SIGNS))
                    beat("the rewards")
            except UserError as error:
                problem = error
        raise_everywhere(problem, problem is not None, self._session.groups)
        groups = [AnswerGroup(one.prompt.sample, one.answers, [0.0] * len(one.answers)) for one in answered]
        of_models = self._models.scores(groups)
        divergences = self._divergence.parts(groups) if self._divergence is not None else []
        first = 0
        for place, group in enumerate(answered):
            scores = found[place]
            for number, one in enumerate(scores):
                scores[number] = _with_models(
                    one, {name: values[first + number] for name, values in of_models.items()}, self._weights
                )
                if self._divergence is not None:
                    scores[number] = _with_kl(scores[number], divergences[first + number], self._divergence.weight)
            judged.append(self._judge(group, scores))
            first += len(scores)
        sums["seconds_reward"] += time.perf_counter() - began
        return judged

    def _judge(self, answered: Answered, scores: list[Score]) -> Judged:
        cache, most = self._session.settings.align.overlong_cache, self._sampling.max_new_tokens
        rewards: list[float | None] = []
        for answer, found in zip(answered.answers, scores, strict=True):
            late = overlong_penalty(len(answer.tokens), most, cache) if cache is not None else 0.0
            rewards.append(None if found.total is None else found.total + late)
        known = torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float64)
        name, options = self._advantage
        of_tokens = name == GAE
        of_answers = known.nan_to_num() if of_tokens else advantages(name, known, len(rewards), **options)
        texts = self._texts(answered, special=True)
        return Judged(answered, texts, scores, rewards, of_answers.tolist(), of_tokens)

    def _count(self, batch: Batch, sums: Sums) -> None:
        """Fills ``fields`` and ``counts`` with sums over all ranks."""
        rewards = [*self._weights, *([KL] if self._divergence is not None else [])]
        add_batch(sums, batch, rewards)
        is_leader = self._loader is not None
        found = self._sum({key: sums[key] if is_leader else 0.0 for key in keys_of(rewards, self._names)})
        batch.fields = fields_of(found, rewards, self._session.groups.dp_size)
        batch.counts = counts_of(found)

    def _sum(self, values: dict[str, float]) -> Sums:
        """The sums of the values over all ranks."""
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums, group=self._session.groups.world_host)
        return Sums(float, zip(values, sums.tolist(), strict=True))


def in_mini_batches(groups: Sequence[Judged], count: int) -> list[list[Judged]]:
    """Divides groups into ``count`` parts that differ by at most one group; each keeps their order."""
    return [list(groups[n * len(groups) // count : (n + 1) * len(groups) // count]) for n in range(count)]


def _with_models(found: Score, of_models: dict[str, float], weights: dict[str, float]) -> Score:
    """A score with those of reward models. One that is NaN or infinite has failed."""
    parts = {name: value if math.isfinite(value) else None for name, value in of_models.items()}
    failures = [f"{name}: it returned {of_models[name]}" for name, value in parts.items() if value is None]
    return score({**found.parts, **parts}, [*found.failures, *failures], weights)


def _with_kl(found: Score, part: float, weight: float) -> Score:
    """A score with the divergence as a further part. An answer without a reward still has none."""
    parts = {**found.parts, KL: part if math.isfinite(part) else None}
    if found.total is None or not math.isfinite(part):
        failures = [] if math.isfinite(part) else [f"{KL}: it is {part}"]
        return Score(None, parts, [*found.failures, *failures])
    return Score(found.total + weight * part, parts, found.failures)
