"""Answers to held-out questions while a model is trained: their scores for the metrics, some of them for a reader."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from megavlm.align.answering import Answering
from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.answers import first_sample
from megavlm.data.renderer import Renderer
from megavlm.evaluation.held_out_rows import HeldOutSource
from megavlm.evaluation.judge import Judge
from megavlm.evaluation.untouched import raise_first, told, training_untouched
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, LoggedTurn, RolloutLog, held_out_log
from megavlm.platform.collectives import all_gather_objects, broadcast_object, gather_objects
from megavlm.records.skipped_samples import SkippedSample
from megavlm.rewards.score import Score
from megavlm.rollout.engine import Answer, Answered, Prompt
from megavlm.sources.blend import open_eval_sources
from megavlm.training.hooks import Fields
from megavlm.training.run import Run

_SHOWN = 8  # questions of an evaluation that the report shows, about as many of each source


@dataclass(frozen=True)
class _Judged:
    """An answer on its way to rank 0; ``shown`` is None unless its question may be among those that are shown."""

    source: int
    index: int
    name: str
    score: Score
    tokens: int
    is_cut: bool
    shown: LoggedGroup | None


class HeldOutAnswers:
    """Has the model answer the first questions of each source of data.eval. It is called on all ranks (see ``Hook``).

    Args:
        settings: the settings of the run.
        make_judge: makes what answers and judges in an evaluation, from the run and the tokenizer.
    """

    def __init__(self, settings: Settings, make_judge: Callable[[Run, Any], Judge]):
        self._settings, self._make_judge = settings, make_judge
        self._names = [source.label for source in settings.data.eval]
        self._shown = max(_SHOWN // max(len(self._names), 1), 1)
        self._source: HeldOutSource | None = None  # on leaders, from ``prepare`` on
        self._log: RolloutLog | None = None
        self._has_told = False  # whether it has said which questions cannot be used, and which answers have no score

    def prepare(self, run: Run) -> None:
        """Opens the sources on leaders. Raises UserError on all ranks if one cannot be read."""
        settings, groups = self._settings, run.session.groups
        how, output = Answering.of(settings), required(settings.output, "output")
        renderer = Renderer.of_prompts(settings.model.hf, settings.data, how.room, how.setting)
        self._tokenizer = renderer.tokenizer
        self._log = held_out_log(output, run.first_step, _SHOWN, enabled=run.session.is_first)
        problem = None
        with training_untouched(run):
            if groups.is_leader:
                try:
                    self._source = HeldOutSource(
                        open_eval_sources(settings.data),
                        renderer,
                        "prompt",
                        settings.data.model_copy(update={"packing": "none"}),
                        settings.eval.answers.samples,
                        groups.dp_rank,
                        groups.dp_size,
                        output,
                    )
                except UserError as error:
                    problem = error
            raise_first(all_gather_objects(problem, groups.world_host))

    def __call__(self, run: Run, step: int, say: Callable[[str], None]) -> Fields:
        """Has the questions answered, says the result, and returns fields for metrics.jsonl."""
        began, world = time.perf_counter(), run.session.groups.world_host
        skipped: list[SkippedSample] = []
        with training_untouched(run), self._make_judge(run, self._tokenizer) as judge:
            answered: list[Answered] = []
            prompts = self._prompts(skipped) if self._source is not None else None
            for one in judge.engine.generate(prompts, judge.sampling):
                judge.submit(len(answered), one)
                answered.append(one)
            mine = self._judged(judge, answered, judge.scores(answered))
            names = list(judge.weights)
        everything = gather_objects((mine, skipped), world)
        fields = None
        if run.session.is_first:
            judged = sorted(itertools.chain.from_iterable(part for part, _ in everything), key=_place)
            fields = self._fields(judged, names)
            self._write(step, judged)
            say(told(step, fields, time.perf_counter() - began))
            for remark in self._remarks(judged, [one for _, part in everything for one in part]):
                say(remark)
        fields = broadcast_object(fields, world)
        assert fields is not None, "rank 0 has sent them"
        return fields

    def _prompts(self, skipped: list[SkippedSample]) -> Iterator[Prompt]:
        """The questions of this data-parallel rank; adds to ``skipped`` what cannot be used."""
        assert self._source is not None, "leaders have questions"
        for number in range(len(self._names)):
            for row in self._source.rows(number):
                skipped += row.skipped_samples
                yield Prompt(first_sample(row), (0,))  # the most likely tokens depend on no seed

    def _judged(self, judge: Judge, answered: Sequence[Answered], scores: Sequence[Sequence[Score]]) -> list[_Judged]:
        """The answers of this data-parallel rank in the order of their questions."""
        pairs = sorted(zip(answered, scores, strict=True), key=lambda pair: _place(pair[0].prompt.sample))
        judged: list[_Judged] = []
        for one, (score,) in pairs:
            sample, (answer,) = one.prompt.sample, one.answers
            is_shown = sum(before.source == sample.source_id for before in judged) < self._shown
            shown = _logged(one, judge.whole_text(answer), score) if is_shown else None
            is_cut = answer.finish == "length"
            judged.append(_Judged(sample.source_id, sample.index, sample.source, score, answer.num_said, is_cut, shown))
        return judged

    def _fields(self, judged: Sequence[_Judged], names: list[str]) -> dict[str, float | None]:
        fields = _means("eval/answers", judged, names)
        if len(self._names) > 1:
            for number, name in enumerate(self._names):
                of_source = [one for one in judged if one.source == number]
                fields |= _means(f"eval/{name}/answers", of_source, names)
        return fields

    def _write(self, step: int, judged: Sequence[_Judged]) -> None:
        groups = []
        for number in range(len(self._names)):
            groups += [one.shown for one in judged if one.source == number and one.shown is not None][: self._shown]
        assert self._log is not None, "the hook was prepared"
        self._log.write(step, groups)

    def _remarks(self, judged: Sequence[_Judged], skipped: Sequence[SkippedSample]) -> list[str]:
        """What is said once: questions that cannot be used, and answers without a score."""
        if self._has_told:
            return []
        self._has_told = True
        remarks = []
        if skipped:
            first, count = skipped[0], counted(len(skipped), "sample")
            remarks.append(f"eval.answers: {count} cannot be asked; the first is {first.sample}: {first.cause}")
        if without := [one for one in judged if one.score.total is None]:
            first_one = without[0]
            cause = next(iter(first_one.score.failures), "no scorer applies to it")
            remarks.append(
                f"eval.answers: {len(without)} of {counted(len(judged), 'answer')} have no score; the first is that to "
                f"{first_one.name}: {cause}"
            )
        return remarks


def _place(one: Any) -> tuple[int, int]:
    """The number of its source and its index in it: of a ``_Judged`` or a ``Sample``."""
    return (one.source, one.index) if isinstance(one, _Judged) else (one.source_id, one.index)


def _means(prefix: str, judged: Sequence[_Judged], names: list[str]) -> dict[str, float | None]:
    """The fields of some answers. The order of the sums is that of the questions, so that layouts agree to the bit."""
    mean = lambda values: fsum(values) / len(values) if values else None
    fields = {f"{prefix}/score": mean([one.score.total for one in judged if one.score.total is not None])}
    for name in names if len(names) > 1 else []:
        parts = [part for one in judged if (part := one.score.parts.get(name)) is not None]
        fields[f"{prefix}/score/{name}"] = mean(parts)
    fields[f"{prefix}/length"] = mean([one.tokens for one in judged])
    fields[f"{prefix}/truncated_share"] = mean([float(one.is_cut) for one in judged])
    return fields


def _logged(answered: Answered, text: str, score: Score) -> LoggedGroup:
    """What a reader sees of an answer."""
    asked, answer = answered.asked, answered.answers[0]
    shown = LoggedAnswer(
        text, score.total, score.parts, None, answer.num_said, answer.finish, score.failures, _turns(answer)
    )
    return LoggedGroup(answered.prompt.sample.source, asked.question, asked.media, asked.reference, [shown])


def _turns(answer: Answer) -> list[LoggedTurn]:
    return [LoggedTurn(turn.by, turn.text, turn.pictures) for turn in answer.turns]
