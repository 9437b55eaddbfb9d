"""The curves of reinforcement learning: rewards, the policy, the answers, and where the time goes."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from megavlm.base.number_format import short
from megavlm.report.charts import Curve, chart
from megavlm.report.preferences import held_out_score, in_percent

_COLORS = ("loss", "lr", "vision", "projector", "language", "soft")  # for the rewards of a chart; further have another


def is_rl(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether these are metrics of reinforcement learning."""
    return any("reward" in line for line in lines)


def policy_charts(lines: Sequence[dict[str, Any]]) -> list[tuple[str, list[Markup]]]:
    """The charts under their headings; those without values are empty."""
    steps = [line["step"] for line in lines]

    def curve(name: str, field: str, color: str) -> Curve:
        return Curve.smoothed(name, [line.get(field) for line in lines], color)

    def share(title: str, field: str, color: str, note: str) -> Markup:
        drawn = Curve.smoothed(f"{field}, %", in_percent(lines, field), color)
        return chart(title, steps, [drawn], from_zero=True, note=note)

    def count(title: str, name: str, field: str, color: str) -> Markup:
        return chart(title, steps, [curve(name, field, color)], from_zero=True)

    names = list(dict.fromkeys(name for line in lines for name in line if name.startswith("reward/")))
    parts = [
        chart(
            f"Each reward, from number {first + 1}" if first else "Each reward",
            steps,
            [
                curve(name.removeprefix("reward/"), name, color)
                for name, color in zip(names[first:], _COLORS, strict=False)
            ],
            note="before its weight",
        )
        for first in range(0, len(names), len(_COLORS))
    ]
    sampled = [curve("prompts", "groups", "loss"), curve("answers", "answers", "vision")]
    ratios = [curve("mean", "ratio_mean", "loss"), curve("largest", "ratio_max", "projector")]
    mismatch = [curve("mean", "mismatch_kl", "loss"), curve("largest", "mismatch_max", "projector")]
    has_mismatch = any(value for drawn in mismatch for value in drawn.values)  # one engine for both: all zero
    seconds = [
        curve(name, f"seconds_{name}", color)
        for name, color in (
            *(("rollout", "loss"), ("reward", "lr"), ("update", "language"), ("sync", "soft")),
            *(("values", "projector"), ("critic", "speed")),
        )
    ]
    turns = []
    if any("turns" in line for line in lines):
        turns = [
            chart("Turns", steps, [curve("turns", "turns", "vision")], from_zero=True, note="mean of the model's"),
            share("Ended by environment.max_turns, %", "truncated_by_turns", "projector", ""),
            count("Failed environments", "answers", "environment_failures", "projector"),
        ]
        seconds.append(curve("environment", "seconds_environment", "vision"))
    of_critic = [
        chart(
            "Value loss", steps, [curve("loss", "value_loss", "loss")], from_zero=True, note="half the squared error"
        ),
        share("Explained variance of the returns, %", "explained_variance", "vision", "100: the critic knows them"),
        chart("Returns", steps, [curve("mean", "returns", "speed")], note="what the critic should say"),
        share("Limited values, %", "value_clip_share", "lr", ""),
        chart("Gradient norm of the critic", steps, [curve("norm", "critic_grad_norm", "projector")], log=True),
        chart("Learning rate of the critic", steps, [curve("rate", "critic_lr", "lr")], from_zero=True),
    ]
    return [
        (
            "Rewards",
            [
                chart("Reward", steps, [curve("reward", "reward", "speed"), held_out_score(lines)], note="mean"),
                *parts,
                chart("Spread of rewards", steps, [curve("std", "reward_std", "speed")], from_zero=True, note="std"),
                share("Groups without spread, %", "flat_groups", "lr", "they teach nothing"),
                count("Failed rewards", "answers", "reward_failures", "projector"),
            ],
        ),
        (
            "Policy",
            [
                chart("Entropy", steps, [curve("entropy", "entropy", "loss")], from_zero=True, note="nats per token"),
                chart(
                    "KL to the reference", steps, [curve("kl", "kl", "vision")], from_zero=True, note="nats per token"
                ),
                share("Clipped tokens, %", "clip_share", "lr", ""),
                chart("Ratio of probabilities", steps, ratios, log=True, note="new to old"),
                share("Limited by align.correction, %", "corrected_share", "language", "tokens"),
                count("Skipped updates", "updates", "skipped_updates", "projector"),
                chart("Sampler against trainer", steps, mismatch, log=has_mismatch, note="nats per token"),
                chart("Staleness", steps, [curve("steps", "staleness", "soft")], from_zero=True, note="steps"),
            ],
        ),
        *([("Critic", of_critic)] if any("value_loss" in line for line in lines) else []),
        (
            "Answers",
            [
                chart("Sampled in a step", steps, sampled, from_zero=True, label=short),
                chart("Length", steps, [curve("tokens", "answer_tokens", "loss")], from_zero=True, note="mean tokens"),
                share("Cut off, %", "truncated_share", "projector", "longer than rollout.max_new_tokens"),
                count("Frames that the frozen tower encoded once", "frames", "frames_kept", "vision"),
                *turns,
            ],
        ),
        (
            "Time",
            [
                chart("Seconds of a step", steps, seconds, from_zero=True),
                chart(
                    "Sampled tokens per second",
                    steps,
                    [curve("tokens/s", "rollout_tokens_per_second", "speed")],
                    from_zero=True,
                    label=short,
                ),
            ],
        ),
    ]
