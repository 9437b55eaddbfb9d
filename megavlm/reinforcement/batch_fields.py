"""The fields of metrics.jsonl that tell of a batch of sampled answers, and its counts."""

from collections import defaultdict
from collections.abc import Sequence

from megavlm.reinforcement.judged import Batch

Sums = defaultdict[str, float]
"""Sums over the answers or prompts of this rank, by name; what is missing is 0."""


def add_batch(sums: Sums, batch: Batch, rewards: Sequence[str]) -> None:
    """Adds the groups of a batch to ``sums``; ``rewards`` are the names of all rewards."""
    for group in batch.shown:
        known = [reward for reward in group.rewards if reward is not None]
        sums["groups"] += 1
        sums["flat"] += group.is_flat
        sums["answers"] += len(group.rewards)
        sums["reward"] += sum(known)
        sums["squares"] += sum(reward**2 for reward in known)
        sums["judged"] += len(known)
        sums["failures"] += sum(bool(score.failures) for score in group.scores)
        sums["tokens"] += sum(answer.num_said for answer in group.answered.answers)
        sums["truncated"] += sum(answer.finish == "length" for answer in group.answered.answers)
        sums["turns"] += sum(answer.num_turns for answer in group.answered.answers)
        sums["environment_failures"] += sum(bool(answer.failures) for answer in group.answered.answers)
        sums["out_of_turns"] += sum(answer.is_out_of_turns for answer in group.answered.answers)
        for name in rewards:
            parts = [part for score in group.scores if (part := score.parts.get(name)) is not None]
            sums[f"part/{name}"] += sum(parts)
            sums[f"parts/{name}"] += len(parts)
    sums["skipped"] += len(batch.skipped_samples)
    sums["learned"] += sum(len(group.group.answers) for group in batch.groups)


def keys_of(rewards: Sequence[str], sources: Sequence[str]) -> list[str]:
    """The keys of all sums, the same on all ranks."""
    names = [
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
        "learned",
    ]
    names += ["turns", "environment_failures", "out_of_turns", "staleness"]
    names += ["seconds_rollout", "seconds_sampling", "seconds_reward", "seconds_environment", "seconds_sync"]
    names += [f"{kind}/{name}" for kind in ("part", "parts") for name in rewards]
    return names + [f"{kind}/{name}" for kind in ("used", "newly_read") for name in sources]


def fields_of(sums: Sums, rewards: Sequence[str], data_parallel: int) -> dict[str, float | None]:
    """The fields for metrics.jsonl from the sums of all ranks."""
    judged, answers, seconds = sums["judged"], max(sums["answers"], 1), sums["seconds_sampling"] / data_parallel
    mean = sums["reward"] / judged if judged else None
    of_rewards = {
        f"reward/{name}": sums[f"part/{name}"] / count if (count := sums[f"parts/{name}"]) else None for name in rewards
    }
    return {
        "reward": mean,
        "reward_std": None if mean is None else max(sums["squares"] / judged - mean**2, 0.0) ** 0.5,
        **of_rewards,
        "groups": int(sums["groups"]),
        "flat_groups": sums["flat"] / max(sums["groups"], 1) if sums["answers"] > sums["groups"] else None,
        "answers": int(sums["answers"]),
        "answer_tokens": sums["tokens"] / answers,
        "truncated_share": sums["truncated"] / answers,
        "reward_failures": int(sums["failures"]),
        "staleness": sums["staleness"] / max(sums["groups"], 1),
        "seconds_rollout": sums["seconds_rollout"] / data_parallel,
        "seconds_reward": sums["seconds_reward"] / data_parallel,
        "seconds_sync": sums["seconds_sync"] / data_parallel,
        "rollout_tokens_per_second": sums["tokens"] / seconds if seconds else None,
    }


def environment_fields(sums: Sums, data_parallel: int) -> dict[str, float | None]:
    """The fields of a run with an environment from the sums of all ranks."""
    answers = max(sums["answers"], 1)
    return {
        "turns": sums["turns"] / answers,
        "environment_failures": int(sums["environment_failures"]),
        "truncated_by_turns": sums["out_of_turns"] / answers,
        "seconds_environment": sums["seconds_environment"] / data_parallel,
    }


def counts_of(sums: Sums) -> dict[str, float]:
    """The counts of ``Batch`` from the sums of all ranks."""
    counts = {key: value for key, value in sums.items() if key.startswith(("used/", "newly_read/"))}
    return counts | {"skipped_samples": sums["skipped"], "samples": sums["learned"]}
