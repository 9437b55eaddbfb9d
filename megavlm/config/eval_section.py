"""The section eval: evaluation while training."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.reward_section import Rewards
from megavlm.config.section import Int, Section, Str

SCORE = "answers/score"
# What can be measured of held-out data, and whether more of it is better.
MEASURES = {"loss": False, "accuracy": True, "margin": True, SCORE: True}


def _spelled_out(scorer: Any) -> Any:
    """A list of rewards, of which each may be given by its name alone: exact, or FILE.py:FUNCTION."""
    listed = scorer if isinstance(scorer, list) else [scorer]
    return [{"python" if ":" in one else "name": one} if isinstance(one, str) else one for one in listed]


class HeldOutAnswersSettings(Section):
    """Answers to held-out questions while training."""

    samples: Int | None = Field(
        None,
        ge=1,
        description="number of questions of each source of data.eval, from its beginning, that the model answers in an "
        "evaluation, always with the most likely token. null: none; for grpo and ppo all",
    )
    scorer: Annotated[Rewards, BeforeValidator(_spelled_out)] = Field(
        [],
        description="how the answers are judged: exact, math, choice, format or length, a function of your own "
        "(FILE.py:FUNCTION), or a list as in the section reward, whose weighted sum is the score. []: for grpo and ppo "
        "the rewards of the run",
    )
    max_new_tokens: Int | None = Field(
        None,
        ge=1,
        description="maximum number of tokens in an answer; null: generate.max_new_tokens, for grpo and ppo "
        "rollout.max_new_tokens",
    )

    @field_validator("scorer")
    @classmethod
    def _functions(cls, scorer: Rewards) -> Rewards:
        if any(reward.model is not None for reward in scorer):
            raise UserError(
                "a reward model cannot be a scorer", "use a function, or for grpo and ppo a model in the section reward"
            )
        if scorer and not any(reward.weight for reward in scorer):
            raise UserError("all scorers have weight 0: there would be no score", "give one of them a weight")
        return scorer


class EvalSettings(Section):
    """Evaluation while training: loss and answers on data.eval, the best checkpoint, and when to stop early."""

    every: Int | None = Field(
        None,
        ge=1,
        description="number of steps between evaluations on data.eval; null: steps do not count. A run that evaluates "
        "also does so before its first step and after its last",
    )
    every_epochs: Int | None = Field(
        None, ge=1, description="number of passes over the training data between evaluations; null: they do not count"
    )
    rows: Int | None = Field(
        None,
        ge=1,
        description="maximum number of rows of each source whose loss is computed, from its beginning; null: all",
    )
    answers: HeldOutAnswersSettings = HeldOutAnswersSettings()
    best: Str | None = Field(
        None,
        description="metric by which the best checkpoint is kept and linked as OUTPUT/checkpoints/best: eval/loss; for "
        "dpo, rm and kto also eval/accuracy and eval/margin; with answers also eval/answers/score; with several "
        "sources also eval/NAME/loss and so on; null: none",
    )
    stop_after: Int | None = Field(
        None,
        ge=1,
        description="number of evaluations in a row without a better value of eval.best after which the run ends; "
        "null: it does not end early",
    )

    @field_validator("best")
    @classmethod
    def _a_metric(cls, best: str | None) -> str | None:
        if best is not None and _parsed(best) is None:
            raise UserError(
                f"{quoted(best)} is not a metric of an evaluation",
                f"{', '.join(f'eval/{name}' for name in MEASURES)}, or of one source of several: eval/NAME/loss and so "
                "on",
            )
        return best

    @model_validator(mode="after")
    def _consistent(self) -> "EvalSettings":
        for name in ("rows", "best", "stop_after"):
            if not self.is_on and getattr(self, name) is not None:
                raise UserError(
                    f"eval.{name} is {getattr(self, name)}, but eval.every is null: it would be ignored",
                    f"set eval.every or eval.every_epochs, or remove eval.{name}",
                )
        if not self.is_on and self.is_changed("answers"):
            raise UserError(
                "eval.answers is set, but eval.every is null: it would be ignored",
                "set eval.every or eval.every_epochs, or remove eval.answers",
            )
        if self.stop_after is not None and self.best is None:
            raise UserError(
                f"eval.stop_after is {self.stop_after}, but eval.best is null: which value is to improve?",
                "set eval.best, for example to eval/loss, or remove eval.stop_after",
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether the run evaluates."""
        return self.every is not None or self.every_epochs is not None

    @property
    def measure(self) -> str | None:
        """What ``best`` measures, a key of MEASURES; None without it."""
        found = _parsed(self.best or "")
        return found[1] if found else None

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of ``best`` is the better one."""
        return self.measure is not None and MEASURES[self.measure]

    def check_names(self, names: list[str]) -> None:
        """Checks ``every`` and ``best`` against the names of the sources of data.eval. Raises UserError."""
        if self.is_on and not names:
            key = "every" if self.every is not None else "every_epochs"
            raise UserError(
                f"eval.{key} is {getattr(self, key)}, but data.eval is not set: there is nothing to evaluate",
                f"set data.eval to a file of held-out samples, or eval.{key} to null",
            )
        several = names if len(names) > 1 else []
        source = (_parsed(self.best or "") or ("", ""))[0]
        if source and source not in several:
            of_sources = ", ".join(f"eval/{name}/{self.measure}" for name in several)
            raise UserError(
                f"eval.best is {self.best}, but data.eval has no source {quoted(source)}"
                + ("" if several else " beside others"),
                f"set eval.best to eval/{self.measure}{f', or to one of {of_sources}' if several else ''}",
            )


def _parsed(metric: str) -> tuple[str, str] | None:
    """The source ("" for all) and the measure of a metric of an evaluation; None if it is none."""
    for measure in sorted(MEASURES, key=len, reverse=True):
        if metric == f"eval/{measure}":
            return "", measure
        if metric.startswith("eval/") and metric.endswith(f"/{measure}"):
            return metric.removeprefix("eval/").removesuffix(f"/{measure}"), measure
    return None
