"""Pretraining and supervised tuning: the model learns to predict its targets; the two differ in their data alone.

A pretraining stage is a recipe (configs/pretrain): what is frozen, how long a row is, the learning rate and its
schedule. The code of all four stages is the same.
"""

from collections.abc import Callable

from megavlm.config.requirements import check_stage, required
from megavlm.config.settings import Settings
from megavlm.data.records import Kind
from megavlm.runtime.session import Session
from megavlm.training.method import FileRows, Prepared
from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL
from megavlm.training.start_weights import StartWeights

STAGES = ("alignment", "all weights", "long context", "ultra-long context")


class LanguageModeling:
    """Cross-entropy of the targets, and with ``train.kl_to_start`` the divergence from the start model.

    Args:
        kind: "pretrain": every text token is a target; "tune": what the assistant says.
        title: heading on the terminal.
    """

    scores = False

    def __init__(self, kind: Kind, title: str):
        self.kind, self.title = kind, title

    def bare_objective(self, session: Session) -> CrossEntropy:
        settings = session.settings
        return CrossEntropy(settings.data.source_names, settings.train.logprob_chunk_tokens)

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        files = FileRows.of(session, self.kind)
        objective, coefficient = self.bare_objective(session), session.settings.train.kl_to_start
        if coefficient:
            start = StartWeights(session)
            objective = CrossEntropyWithKL(objective.source_names, objective.chunk_tokens, coefficient, start)
        return Prepared(objective, files.loader, files.longest_row)


def pretrain(settings: Settings) -> LanguageModeling:
    """The method of ``megavlm pretrain``, of ``settings.stage``. Raises UserError where settings contradict it."""
    check_stage(settings)
    stage = required(settings.stage, "stage")
    return LanguageModeling("pretrain", f"pretrain · stage {stage}, {STAGES[stage]}")


def sft(settings: Settings) -> LanguageModeling:
    """The method of ``megavlm sft``."""
    return LanguageModeling("tune", "supervised tuning")
