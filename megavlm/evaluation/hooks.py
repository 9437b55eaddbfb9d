"""The hooks that evaluate a run while it trains."""

from typing import Any, Protocol, runtime_checkable

from megavlm.config.settings import Settings
from megavlm.evaluation.answers import HeldOutAnswers
from megavlm.evaluation.held_out import HeldOut
from megavlm.evaluation.judge import Judge
from megavlm.records.records import Kind
from megavlm.training.hooks import Hook
from megavlm.training.method import Method
from megavlm.training.run import Run


@runtime_checkable
class JudgesAnswers(Protocol):
    """A method that learns from judged answers, and judges those to held-out questions, too."""

    def held_out_judge(self, run: Run, tokenizer: Any) -> Judge:
        """What answers and judges held-out questions in an evaluation. It is called on all ranks."""


def evaluation_hooks(settings: Settings, kind: Kind, method: Method) -> list[Hook]:
    """The hooks that evaluate, if ``eval.every`` or ``eval.every_epochs`` is set.

    Args:
        settings: the settings of the run.
        kind: what the method trains on.
        method: the method.
    """
    chosen = settings.eval
    if not chosen.is_on:
        return []
    works: list[HeldOut | HeldOutAnswers] = []
    if isinstance(method, JudgesAnswers):
        works.append(HeldOutAnswers(settings, method.held_out_judge))
    else:
        works.append(HeldOut(settings, kind))
        if chosen.answers.samples is not None:
            works.append(HeldOutAnswers(settings, lambda run, tokenizer: Judge(run.session, tokenizer)))
    return [
        Hook(
            work,
            every=chosen.every,
            every_epochs=chosen.every_epochs,
            at_last=True,
            at_start=True,
            prepare=work.prepare,
        )
        for work in works
    ]
