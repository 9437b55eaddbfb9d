"""Pretraining and supervised fine-tuning: the model is trained to predict its targets. They differ only in their data.

A pretraining stage is a recipe in configs/pretrain, which sets the frozen parts, the length of rows, the learning rate
and its schedule. The code of all four stages is the same.
"""

from collections.abc import Callable

from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.records.records import Kind
from megavlm.runtime.session import Session
from megavlm.training.method import FileRows, OneModel, Prepared
from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL
from megavlm.training.pretraining_stage import check_stage
from megavlm.training.start_weights import StartWeights

STAGES = ("alignment", "all weights", "long context", "ultra-long context")


class LanguageModeling(OneModel):
    """Training with the cross-entropy of the targets and, with ``train.kl_to_start``, a KL term to the start model.

    Args:
        kind: which tokens are targets; "pretrain": all text tokens, "tune": only the assistant's answers.
        title: heading on the terminal.
    """

    scores = False

    def __init__(self, kind: Kind, title: str):
        self.kind, self.title = kind, title

    def bare_objective(self, session: Session) -> CrossEntropy:
        settings = session.settings
        return CrossEntropy(settings.data.source_names, settings.train.logprob_chunk_tokens, settings.train.loss)

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        files = FileRows.of(session, self.kind)
        objective, coefficient = self.bare_objective(session), session.settings.train.kl_to_start
        if self.keeps_start(session.settings):
            objective = CrossEntropyWithKL(objective, coefficient, StartWeights(session))
        return Prepared(objective, files.loader, files.longest_row, files.loader)


def pretrain(settings: Settings) -> LanguageModeling:
    """Makes the method of ``megavlm pretrain``. Raises UserError if the settings contradict ``settings.stage``."""
    check_stage(settings)
    stage = required(settings.stage, "stage")
    return LanguageModeling("pretrain", f"pretrain · stage {stage}, {STAGES[stage]}")


def sft(settings: Settings) -> LanguageModeling:
    """Makes the method of ``megavlm sft``."""
    return LanguageModeling("tune", "supervised fine-tuning")
