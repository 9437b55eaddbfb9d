"""Warnings in words when reinforcement learning goes wrong: what was seen, since which step, and what usually helps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.base.number_format import number, percent
from megavlm.monitor.metrics import plain


@dataclass(frozen=True)
class RlWarning:
    """Something that was seen in several lines of metrics.jsonl in a row.

    Attributes:
        kind: the field of metrics.jsonl.
        since: the first step of these lines.
        seen: what was seen, as the beginning of a sentence.
        helps: what usually helps, naming settings.
    """

    kind: str
    since: int
    seen: str
    helps: str

    def __str__(self) -> str:
        return f"since step {self.since}, {self.seen}. What usually helps: {self.helps}"


@dataclass(frozen=True)
class _Check:
    """When to warn of a field of metrics.jsonl.

    Attributes:
        field: the field.
        is_bad: of a value and the first value of the run.
        seen: of the line and the first value: what was seen.
        helps: what usually helps.
        after: number of bad lines in a row after which it is said.
        quiet: number of good lines in a row after which it has gone away, so that it would be said again.
    """

    field: str
    is_bad: Callable[[float, float], bool]
    seen: Callable[[Mapping[str, Any], float], str]
    helps: str
    after: int = 3
    quiet: int = 5


# Entropy falls in every run that succeeds, often to half. At a quarter, the answers of a group are nearly the same one,
# unless a model that knew little began with several nats per token: half a nat is more than most models start with.
LOW_ENTROPY = 0.25
ENOUGH_ENTROPY = 0.5
# Of ten groups, one teaches something; the run then pays for ten times as many answers as it learns from.
MANY_FLAT_GROUPS = 0.9
# On average, each token is e times as likely as under the reference: the policy has become another model. Short answers
# may get near this honestly: one token that rises from probability 0.4 to 1 has log(1 / 0.4) = 0.9.
HIGH_KL = 1.0
# Differences of log-probabilities with variance v give a divergence of v / 2, here v = 0.02. Over an answer of 500
# tokens they sum up to a standard deviation of √(500 · 0.02) = 3.2, so that its weight is wrong by a factor of e^3.2 =
# 24: the update hardly knows any more who sampled the answer.
HIGH_MISMATCH = 0.01
# A clip near 1 no longer bounds the loss of such tokens if their advantage is negative: it grows with the ratio.
HIGH_RATIO = 10.0
# Cut answers miss their result and are rewarded as wrong, although the model might have been on the right way.
MANY_TRUNCATED = 0.25

_CHECKS = (
    _Check(
        "entropy",
        lambda value, first: 0 <= value < min(LOW_ENTROPY * first, ENOUGH_ENTROPY),
        lambda line, first: (
            f"the entropy has collapsed: {number(line['entropy'], 3)} nats per token, "
            f"{percent(line['entropy'] / first, 0)} of the {number(first, 3)} at the start, so the answers to a prompt "
            "are nearly the same and teach little"
        ),
        "a higher align.epsilon_high or rollout.temperature, a lower train.lr, align.beta above 0; starting again "
        "from a checkpoint before that step",
    ),
    _Check(
        "flat_groups",
        lambda value, first: value >= MANY_FLAT_GROUPS,
        lambda line, first: (
            f"rewards have no spread: in {percent(line['flat_groups'], 0)} of the groups all answers got the same "
            f"reward (mean {number(line.get('reward'), 3)}), and such groups teach nothing"
        ),
        "prompts that the model answers rightly sometimes, neither always nor never; a larger rollout.group_size; a "
        "higher rollout.temperature; a reward in finer steps",
        after=5,
    ),
    _Check(
        "kl",
        lambda value, first: value > HIGH_KL,
        lambda line, first: (
            f"the policy runs away from the reference: their divergence (kl) is {number(line['kl'], 3)} nats per token"
        ),
        "a higher align.beta, a lower train.lr; a look at the sampled answers, which may please the reward alone",
    ),
    _Check(
        "mismatch_kl",
        lambda value, first: value > HIGH_MISMATCH,
        lambda line, first: (
            f"sampler and trainer disagree: mismatch_kl is {number(line['mismatch_kl'], 3)} nats per token, and the "
            f"largest difference of a token {number(line.get('mismatch_max'), 3)} nats, although both should have the "
            "same weights"
        ),
        "align.correction (token_truncate or sequence_mask); the same precision in both",
    ),
    _Check(
        "ratio_max",
        lambda value, first: value > HIGH_RATIO,
        lambda line, first: (
            "updates are too large: the probability of a token has changed by a factor of "
            f"{number(line['ratio_max'], 3)} since it was sampled"
        ),
        "a lower train.lr, fewer updates per batch of answers, align.correction if the engine is not the trainer's "
        "own, a lower align.epsilon_high",
    ),
    _Check(
        "truncated_share",
        lambda value, first: value >= MANY_TRUNCATED,
        lambda line, first: (
            f"answers hit the limit: {percent(line['truncated_share'], 0)} were cut off at rollout.max_new_tokens "
            f"(their mean length is {number(line.get('answer_tokens'), 3)} tokens)"
        ),
        "a higher rollout.max_new_tokens; align.mask_truncated, so that cut answers are not taught as wrong; a reward "
        "for length; a lower rollout.temperature if the sampled answers ramble",
    ),
    _Check(
        "reward_failures",
        lambda value, first: value > 0,
        lambda line, first: (
            f"rewards fail, here those of {line['reward_failures']:g} answers, which are left out of their groups"
        ),
        "correcting the reward by the causes that reward_failures.jsonl gives, or raising its time-out",
        after=1,
        quiet=20,  # single failures may come every few steps
    ),
)


class RlWarnings:
    """Watches the lines of metrics.jsonl. Its state follows from them alone, so a resumed run says the same.

    A line without a field, or with null, changes nothing for that field, so other methods are never warned.

    Args:
        lines: the lines of the run so far, oldest first; what they would have said is not said again.

    Attributes:
        standing: field → the warning that has been said and has not gone away since.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()):
        self.standing: dict[str, RlWarning] = {}
        self._first: dict[str, float] = {}  # the first value of each field
        self._bad: dict[str, tuple[int, int]] = {}  # the latest bad lines in a row: first step, number
        self._good: dict[str, int] = {}  # number of good lines in a row since then
        for line in lines:
            self.take(line)

    def take(self, line: Mapping[str, Any]) -> list[RlWarning]:
        """Looks at the line of a step, and returns what is to be said."""
        return [found for check in _CHECKS if (found := self._take(check, line)) is not None]

    def _take(self, check: _Check, line: Mapping[str, Any]) -> RlWarning | None:
        name, value = check.field, plain(line.get(check.field))
        if value is None or (name == "mismatch_kl" and line.get("staleness")):  # older weights differ, as they should
            return None
        first = self._first.setdefault(name, value)
        if not check.is_bad(value, first):
            self._bad.pop(name, None)
            self._good[name] = self._good.get(name, 0) + 1
            if self._good[name] >= check.quiet:
                self.standing.pop(name, None)
            return None
        self._good[name] = 0
        since, count = self._bad.get(name, (line["step"], 0))
        self._bad[name] = since, count + 1
        if count + 1 < check.after or name in self.standing:
            return None
        self.standing[name] = RlWarning(name, since, check.seen(line, first), check.helps)
        return self.standing[name]


def history(lines: Iterable[Mapping[str, Any]]) -> list[tuple[RlWarning, int | None]]:
    """All warnings of a run in the order in which they were said, and the step at which each had gone away, if any."""
    watch = RlWarnings()
    ends: dict[RlWarning, int | None] = {}
    for line in lines:
        before = list(watch.standing.values())
        ends |= dict.fromkeys(watch.take(line))
        ends |= {warning: line["step"] for warning in before if warning.kind not in watch.standing}
    return list(ends.items())
