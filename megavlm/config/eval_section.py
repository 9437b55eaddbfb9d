"""The section eval: evaluation while training."""

from pydantic import Field, field_validator, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Int, Section, Str

# What can be measured of held-out data, and whether more of it is better.
MEASURES = {"loss": False, "accuracy": True, "margin": True}


class EvalSettings(Section):
    """Evaluation while training: the loss on data.eval, the best checkpoint, and when to stop early."""

    every: Int | None = Field(
        None,
        ge=1,
        description="number of steps between evaluations on data.eval; null: none. A run that evaluates also does so "
        "before its first step and after its last",
    )
    rows: Int | None = Field(
        None,
        ge=1,
        description="maximum number of rows of each source that are evaluated, from its beginning; null: all",
    )
    best: Str | None = Field(
        None,
        description="metric by which the best checkpoint is kept and linked as OUTPUT/checkpoints/best: eval/loss; for "
        "dpo, rm and kto also eval/accuracy and eval/margin; with several sources also eval/NAME/loss and so on; "
        "null: none",
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
        if best is not None and not (best.startswith("eval/") and best.rpartition("/")[2] in MEASURES):
            raise UserError(
                f"{quoted(best)} is not a metric of an evaluation", "eval/loss, eval/accuracy, eval/margin, or of one "
                "source of several: eval/NAME/loss, eval/NAME/accuracy, eval/NAME/margin",
            )  # fmt: skip
        return best

    @model_validator(mode="after")
    def _consistent(self) -> "EvalSettings":
        for name in ("rows", "best", "stop_after"):
            if self.every is None and getattr(self, name) is not None:
                raise UserError(
                    f"eval.{name} is {getattr(self, name)}, but eval.every is null: it would be ignored",
                    f"set eval.every, or remove eval.{name}",
                )
        if self.stop_after is not None and self.best is None:
            raise UserError(
                f"eval.stop_after is {self.stop_after}, but eval.best is null: which value is to improve?",
                "set eval.best, for example to eval/loss, or remove eval.stop_after",
            )
        return self

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of ``best`` is the better one."""
        return self.best is not None and MEASURES[self.best.rpartition("/")[2]]

    def check_names(self, names: list[str]) -> None:
        """Checks ``every`` and ``best`` against the names of the sources of data.eval. Raises UserError."""
        if self.every is not None and not names:
            raise UserError(
                f"eval.every is {self.every}, but data.eval is not set: there is nothing to evaluate",
                "set data.eval to a file of held-out samples, or eval.every to null",
            )
        several = names if len(names) > 1 else []
        source = (self.best or "").removeprefix("eval/").rpartition("/")[0]
        if source and source not in several:
            of_sources = ", ".join(f"eval/{name}/loss" for name in several)
            raise UserError(
                f"eval.best is {self.best}, but data.eval has no source {quoted(source)}"
                + ("" if several else " beside others"),
                f"set eval.best to eval/loss{f', or to one of {of_sources}' if several else ''}",
            )
