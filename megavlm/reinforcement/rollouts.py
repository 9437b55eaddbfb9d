"""One batch of reinforcement learning: prompts, sampled answers, their rewards and advantages."""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megavlm.align.losses import advantages
from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.data.answers import first_sample
from megavlm.data.loader import RowLoader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Asked, Row
from megavlm.monitor.reward_failures import JudgedAnswer
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup
from megavlm.records.skipped_samples import SkippedSample
from megavlm.reinforcement.answer_rows import Group
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.rewards.pool import RewardPool
from megavlm.rewards.score import Score, columns_of, overlong_penalty, score
from megavlm.rollout.engine import Answered, Engine, Prompt, Sampling
from megavlm.runtime.session import Session
from megavlm.training.step import raise_everywhere

Sums = defaultdict[str, float]


@dataclass(frozen=True)
class Judged:
    """A prompt with its answers and, for each, its text with special tokens, score, reward (or None), advantage."""

    answered: Answered
    full_texts: list[str]
    scores: list[Score]
    rewards: list[float | None]
    advantages: list[float]

    @property
    def is_flat(self) -> bool:
        """Whether nothing can be learned from the group, because all its rewards are equal or unknown."""
        return not any(self.advantages)

    @property
    def group(self) -> Group:
        """What is learned from. An answer without a reward is left out."""
        known = [n for n, reward in enumerate(self.rewards) if reward is not None]
        answers = self.answered.answers
        return Group(self.answered.prompt.sample, [answers[n] for n in known], [self.advantages[n] for n in known])


@dataclass
class Batch:
    """The answers of a step on this data-parallel rank.

    Attributes:
        groups: the groups to learn from, on the leader; [] elsewhere.
        shown: the groups that were sampled first, whatever became of them, on the leader.
        fields: fields for metrics.jsonl, over all ranks.
        counts: used/NAME, newly_read/NAME of each source and skipped_samples, over all ranks.
        skipped_samples: the prompts of this data-parallel rank that were skipped.
    """

    groups: list[Judged] = field(default_factory=list)
    shown: list[Judged] = field(default_factory=list)
    fields: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    skipped_samples: list[SkippedSample] = field(default_factory=list)


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
        advantage: tuple[str, dict[str, float]],
        replacements: int,
    ):
        self._session, self._engine, self._sampling, self._renderer = session, engine, sampling, renderer
        self._loader, self._rows, self._rewards = loader, rows, rewards
        self._advantage, self._replacements = advantage, replacements
        self._models = models
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
            judged = self._judged(self._answered(self._prompts(math.ceil(missing / size), batch, sums), sums), sums)
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

    def close(self) -> None:
        """Ends the engine and the processes of the rewards."""
        self._engine.close()
        if self._rewards is not None:
            self._rewards.close()

    def _prompts(self, count: int, batch: Batch, sums: Sums) -> list[Prompt]:
        """The next prompts of this data-parallel rank on its leader, [] elsewhere."""
        prompts: list[Prompt] = []
        problem: UserError | None = None
        if self._loader is not None and self._rows is not None:
            groups, seed = self._session.groups, self._session.settings.train.seed
            try:
                for _ in range(count):
                    number = self._loader.taken * groups.dp_size + groups.dp_rank
                    row = next(self._rows)
                    seeds = tuple(seed_of(seed, number, n) for n in range(self._session.settings.rollout.group_size))
                    prompts.append(Prompt(first_sample(row), seeds))
                    batch.skipped_samples += row.skipped_samples
                    for name, new in zip(self._names, row.newly_read, strict=True):
                        sums[f"newly_read/{name}"] += new
                    sums[f"used/{self._names[row.source_ids[0]]}"] += 1
                    for skipped in row.skipped_samples:
                        sums[f"used/{self._names[skipped.source_id]}"] += 1
            except UserError as error:
                problem = error
        raise_everywhere(problem, problem is not None, self._session.groups)
        return prompts

    def _answered(self, prompts: list[Prompt], sums: Sums) -> list[Answered]:
        """Samples, and gives each group to the rewards as soon as it is complete."""
        began, number = time.perf_counter(), {id(prompt): n for n, prompt in enumerate(prompts)}
        done: list[Answered | None] = [None] * len(prompts)
        waiting = iter(prompts) if self._loader is not None else None
        for answered in self._engine.generate(waiting, self._sampling):
            place = number[id(answered.prompt)]
            done[place] = answered
            assert self._rewards is not None, "answers arrive on leaders, which have rewards"
            asked, texts = asked_of(answered), self._texts(answered)
            self._rewards.submit(place, texts, columns_of(asked.columns, asked.question, len(texts)))
        sums["seconds_rollout"] += time.perf_counter() - began
        answers = [answered for answered in done if answered is not None]
        assert len(answers) == len(done), "the engine answers every prompt"
        return answers

    def _texts(self, answered: Answered, *, special: bool = False) -> list[str]:
        tokens = [answer.tokens for answer in answered.answers]
        assert self._renderer is not None, "answers arrive on leaders"
        return self._renderer.tokenizer.batch_decode(tokens, skip_special_tokens=not special)

    def _judged(self, answered: list[Answered], sums: Sums) -> list[Judged]:
        began, found, judged = time.perf_counter(), dict[Hashable, list[Score]](), list[Judged]()
        problem: UserError | None = None
        if self._rewards is not None:
            try:
                found = dict(self._rewards.wait())
            except UserError as error:
                problem = error
        raise_everywhere(problem, problem is not None, self._session.groups)
        of_models = self._models.scores([
            Group(group.prompt.sample, group.answers, [0.0] * len(group.answers)) for group in answered
        ])  # fmt: skip
        first = 0
        for place, group in enumerate(answered):
            scores = found[place]
            for number, one in enumerate(scores):
                parts = {name: values[first + number] for name, values in of_models.items()}
                scores[number] = score({**one.parts, **parts}, one.failures, self._weights)
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
        of_answers = advantages(name, known, len(rewards), **options)
        return Judged(answered, self._texts(answered, special=True), scores, rewards, of_answers.tolist())

    def _count(self, batch: Batch, sums: Sums) -> None:
        """Fills ``fields`` and ``counts`` with sums over all ranks."""
        names = list(self._weights)
        for group in batch.shown:
            rewards = [reward for reward in group.rewards if reward is not None]
            sums["groups"] += 1
            sums["flat"] += group.is_flat
            sums["answers"] += len(group.rewards)
            sums["reward"] += sum(rewards)
            sums["squares"] += sum(reward**2 for reward in rewards)
            sums["judged"] += len(rewards)
            sums["failures"] += sum(len(score.failures) > 0 for score in group.scores)
            sums["tokens"] += sum(len(answer.tokens) for answer in group.answered.answers)
            sums["truncated"] += sum(answer.finish == "length" for answer in group.answered.answers)
            for name in names:
                parts = [p for score in group.scores if (p := score.parts.get(name)) is not None]
                sums[f"part/{name}"] += sum(parts)
                sums[f"parts/{name}"] += len(parts)
        sums["skipped"] += len(batch.skipped_samples)
        size = self._session.groups.dp_size
        keys = [
            "groups",
            "flat",
            "answers",
            "reward",
            "squares",
            "judged",
            "failures",
            "tokens",
            "truncated",
            "skipped",
        ]
        keys += [f"{kind}/{name}" for kind in ("part", "parts") for name in names]
        keys += [f"{kind}/{name}" for kind in ("used", "newly_read") for name in self._names]
        keys += ["seconds_rollout", "seconds_reward"]
        here = {key: float(sums[key]) if self._loader is not None else 0.0 for key in keys}
        found = self._sum(here)
        judged, answers = max(found["judged"], 1), max(found["answers"], 1)
        mean = found["reward"] / judged
        seconds = found["seconds_rollout"] / size
        batch.fields = {
            "reward": mean if found["judged"] else None,
            "reward_std": max(found["squares"] / judged - mean**2, 0.0) ** 0.5 if found["judged"] else None,
            **{
                f"reward/{name}": found[f"part/{name}"] / found[f"parts/{name}"] if found[f"parts/{name}"] else None
                for name in names
            },
            "groups": int(found["groups"]),
            "flat_groups": found["flat"] / max(found["groups"], 1),
            "answers": int(found["answers"]),
            "answer_tokens": found["tokens"] / answers,
            "truncated_share": found["truncated"] / answers,
            "reward_failures": int(found["failures"]),
            "staleness": 0,
            "seconds_rollout": seconds,
            "seconds_reward": found["seconds_reward"] / size,
            "seconds_sync": 0.0,
            "rollout_tokens_per_second": found["tokens"] / seconds if seconds else None,
        }
        batch.counts = {key: value for key, value in found.items() if key.startswith(("used/", "newly_read/"))}
        batch.counts["skipped_samples"] = found["skipped"]

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums, group=self._session.groups.world_host)
        return dict(zip(values, sums.tolist(), strict=True))


def asked_of(answered: Answered) -> Asked:
    """The record of a prompt."""
    asked = answered.prompt.sample.annotations.asked
    assert asked is not None, "prompts are drafted with their records"
    return asked


def seed_of(*numbers: int) -> int:
    """A number in 0 … 2⁶³ - 1 that differs for different numbers, such as (run, prompt, answer)."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def in_mini_batches(groups: Sequence[Judged], count: int) -> list[list[Judged]]:
    """Divides groups into ``count`` parts that differ by at most one group; each keeps their order."""
    return [list(groups[n * len(groups) // count : (n + 1) * len(groups) // count]) for n in range(count)]


def failures_of(groups: Sequence[Judged]) -> list[JudgedAnswer]:
    """What is recorded of rewards that failed or did not apply."""
    return [
        JudgedAnswer(group.answered.prompt.sample.source, n, score.parts, score.failures, score.total is not None)
        for group in groups
        for n, score in enumerate(group.scores)
    ]


def logged(group: Judged) -> LoggedGroup:
    """What a reader sees of a group."""
    asked, answers = asked_of(group.answered), []
    for answer, text, one, reward, advantage in zip(
        group.answered.answers, group.full_texts, group.scores, group.rewards, group.advantages, strict=True
    ):
        shown = None if reward is None else advantage
        answers.append(LoggedAnswer(text, reward, one.parts, shown, len(answer.tokens), answer.finish, one.failures))
    return LoggedGroup(group.answered.prompt.sample.source, asked.question, asked.media, asked.reference, answers)
