"""What a run measures of whole answers in each step, in plain words: accuracy, margin and the rewards behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from megavlm.report.charts import Curve, chart

HELD_OUT_SCORE = "eval/answers/score"  # the field of the mean score of answers to held-out questions


@dataclass(frozen=True)
class Preferences:
    """How a method compares answers, and what its numbers mean. The texts stand in charts and tiles.

    Attributes:
        accuracy: what the field `accuracy` is the share of.
        margin: what the field `margin` is the difference of.
        measured: what the two curves behind the margin show: rewards or scores.
        curves: (field, name) of these curves; () if metrics.jsonl has none.
    """

    accuracy: str
    margin: str
    measured: str
    curves: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> "Preferences | None":
        """Those of the run with these metrics; None if it does not compare answers."""
        fields = set().union(*lines[-1:])
        return next((found for mark, found in _BY_FIELD.items() if {mark, "accuracy"} <= fields), None)


_BY_FIELD = {  # a field that only this method writes → its words
    "rewards/chosen": Preferences(
        "pairs whose chosen answer has the higher reward",
        "reward of the chosen minus that of the rejected answer",
        "Mean reward",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
    ),
    "rewards/desirable": Preferences(
        "answers rewarded as they are labelled",
        "mean reward of the desirable minus that of the undesirable answers",
        "Mean reward",
        (("rewards/desirable", "desirable"), ("rewards/undesirable", "undesirable")),
    ),
    "scores/mean": Preferences(
        "pairs whose chosen answer has the higher score",
        "score of the chosen minus that of the rejected answer",
        "Score",
        (),
    ),
}


def in_percent(lines: Sequence[dict[str, Any]], field: str = "accuracy") -> list[float | None]:
    """A share of each line in percent; None for lines without it."""
    return [None if line.get(field) is None else 100 * line[field] for line in lines]


def held_out_score(lines: Sequence[dict[str, Any]]) -> Curve:
    """The mean score of the answers to held-out questions."""
    return Curve("held out", [line.get(HELD_OUT_SCORE) for line in lines], "loss", sparse=True)


def method_charts(lines: Sequence[dict[str, Any]]) -> list[Markup]:
    """The charts of what a run measures beside the loss that every run has; those without values are empty."""
    steps = [line["step"] for line in lines]

    def curve(name: str, field: str, color: str) -> Curve:
        return Curve.smoothed(name, [line.get(field) for line in lines], color)

    def held_out(name: str, field: str, color: str = "loss") -> Curve:
        return Curve(name, [line.get(field) for line in lines], color, sparse=True)

    charts = []
    if found := Preferences.of(lines):
        accuracy = Curve.smoothed("accuracy, %", in_percent(lines), "speed")
        of_held_out = Curve("held out, %", in_percent(lines, "eval/accuracy"), "loss", sparse=True)
        margin = curve("margin", "margin", "language")
        charts = [
            chart("Accuracy, %", steps, [accuracy, of_held_out], from_zero=True, note=found.accuracy),
            chart("Margin", steps, [margin, held_out("held out", "eval/margin")], from_zero=True, note=found.margin),
        ]
        colors = ("loss", "projector")
        behind = [curve(name, field, color) for (field, name), color in zip(found.curves, colors, strict=False)]
        charts.append(chart(found.measured, steps, behind))
    sources = sorted({name for line in lines[-1:] for name in line if name.startswith("loss/")})
    of_sources = [curve(name.removeprefix("loss/"), name, _COLORS[i]) for i, name in enumerate(sources[: len(_COLORS)])]
    fields = sorted({name for line in lines for name in line if name.startswith("eval/")})

    def of_each(measure: str) -> list[Curve]:
        """The curves of each held-out source, beside that of all."""
        named = [(name[5 : -len(measure) - 1], name) for name in fields if name.endswith(f"/{measure}")]
        found = [(source, name) for source, name in named if source]
        return [held_out(source, name, color) for (source, name), color in zip(found, _COLORS, strict=False)]

    scores = [held_out("all", HELD_OUT_SCORE, "text"), *of_each("answers/score")]
    scorers = [name for name in fields if name.startswith(f"{HELD_OUT_SCORE}/")]
    of_scorers = [held_out(name.rpartition("/")[2], name, color) for name, color in zip(scorers, _COLORS, strict=False)]
    divergence = [curve("KL", "kl_to_start", "vision")]
    return [
        *charts,
        chart("Loss of each source", steps, of_sources),
        chart("Held-out loss of each source", steps, of_each("loss")),
        chart("Score of held-out answers", steps, scores, note="mean"),
        chart("Each scorer of held-out answers", steps, of_scorers, note="before its weight"),
        chart(
            "Length of held-out answers",
            steps,
            [held_out("tokens", "eval/answers/length", "text")],
            from_zero=True,
            note="mean tokens",
        ),
        chart(
            "Held-out answers cut off, %",
            steps,
            [Curve("cut off", in_percent(lines, "eval/answers/truncated_share"), "projector", sparse=True)],
            from_zero=True,
        ),
        chart("Divergence from the start (KL)", steps, divergence, from_zero=True, note="nats per target"),
    ]


_COLORS = ("loss", "lr", "speed", "projector", "language", "vision")  # for sources; further ones have no curve
