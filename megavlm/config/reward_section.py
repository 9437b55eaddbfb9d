"""The reward list: how answers are judged in reinforcement learning, and the processes that do it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Bool, FilePath, Float, Int, Section, Str

_OPTIONS = {  # the options of each function
    "exact": ("field", "strict"),
    "math": ("field", "decimals"),
    "choice": ("field", "choices"),
    "format": ("pattern", "prompt_opens"),
    "length": ("limit", "margin", "unit"),
}


class RewardSettings(Section):
    """One reward: a function of megavlm's, a function in a Python file, or a reward model."""

    name: Literal["exact", "math", "choice", "format", "length"] | None = Field(
        None,
        description="function that judges answers. exact: whether the answer is that of the record; math: whether it "
        "is equal as a number or formula; choice: whether the right option was chosen; format: whether the answer has "
        "the wanted form; length: a penalty for long answers. Each reward has either name, python or model",
    )
    python: Str | None = Field(
        None,
        description="function of your own, written FILE.py:FUNCTION; a relative path starts from the current folder",
    )
    model: FilePath | None = Field(
        None, description="trained reward model: the output folder of a run of megavlm rm, or a checkpoint of it"
    )
    label: Str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="name in metrics, reward/LABEL; null: the name, the function or the folder of the model",
    )
    weight: Float = Field(
        1.0, description="factor of this reward in the sum; may be negative. 0: it is only reported in the metrics"
    )
    timeout: Float | None = Field(
        None,
        gt=0,
        description="only for name and python: seconds that the answers to one prompt may take. Answers that need "
        "longer get no reward and are left out of the update. null: 10 for name, 60 for python",
    )
    field: Str = Field(
        "answer",
        min_length=1,
        description="only for exact, math and choice: field of the records with the right answer, or a list of right "
        "answers. Without it, the assistant messages at the end of a record are the answer",
    )
    strict: Bool = Field(
        False,
        description="only for exact: whether case, white space within the answer and punctuation at its ends count",
    )
    decimals: Int = Field(
        6, ge=0, le=15, description="only for math: decimal places to which numbers are rounded before comparison"
    )
    choices: Str = Field(
        "choices",
        min_length=1,
        description="only for choice: field of the records with the texts of the options, a list (A, B, …) or a "
        "mapping from letters to texts. Records may lack it if their answer is a letter",
    )
    pattern: Str | None = Field(
        None,
        min_length=1,
        description="only for format: regular expression that the whole answer must match; the dot also matches line "
        "breaks. null: <think>…</think><answer>…</answer>, each once and nothing else",
    )
    prompt_opens: Bool = Field(
        False,
        description="only for format without pattern: whether the prompt ends with <think>, so that answers do not "
        "begin with it",
    )
    limit: Int | None = Field(None, ge=1, description="only for length, which needs it: length without a penalty")
    margin: Int | None = Field(
        None,
        ge=1,
        description="only for length: the penalty grows evenly from 0 at limit to -1 at limit + margin; null: as limit",
    )
    unit: Literal["characters", "words"] = Field("characters", description="only for length: what is counted")

    @property
    def key(self) -> str:
        """The name in metrics."""
        folder = self.model.absolute().name if self.model else ""
        return self.label or self.name or self.function or re.sub(r"[^\w.-]", "_", folder) or "model"

    @property
    def file(self) -> Path | None:
        """The Python file; None if the reward is of another kind."""
        return Path(self.python.rpartition(":")[0]).expanduser() if self.python else None

    @property
    def function(self) -> str | None:
        """The name of the function in the Python file; None if the reward is of another kind."""
        return self.python.rpartition(":")[2] if self.python else None

    @property
    def seconds(self) -> float:
        """The time-out."""
        return self.timeout or (60.0 if self.python else 10.0)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the function `name`; none for the other kinds."""
        return {option: getattr(self, option) for option in _OPTIONS.get(self.name or "", ())}

    @model_validator(mode="after")
    def _consistent(self) -> "RewardSettings":
        given = [kind for kind in ("name", "python", "model") if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise UserError(f"a reward has either name, python or model; this one has {found}", "give it one of them")
        for name, options in _OPTIONS.items():
            for option in options:
                if option not in self.options and self.is_changed(option):
                    functions = " or ".join(name for name, known in _OPTIONS.items() if option in known)
                    raise UserError(
                        f"the reward {self.key} has {option} {quoted(getattr(self, option))}, which would be ignored: "
                        f"it is only for {functions}",
                        f"remove {option}",
                    )
        if self.model is not None and self.timeout is not None:
            raise UserError(
                f"the reward {self.key} has timeout {self.timeout:g}, which would be ignored: the training ranks "
                "themselves run a reward model",
                "remove timeout",
            )
        if self.python is not None and not re.fullmatch(r"[^\0]*[^/\0]:[A-Za-z_]\w*", self.python):
            raise UserError(
                f"a reward has python {quoted(self.python)}, which is not FILE.py:FUNCTION",
                "write the file, a colon and the name of a function in it, for example rewards.py:short",
            )
        self._check_options()
        return self

    def _check_options(self) -> None:
        if self.name == "length" and self.limit is None:
            raise UserError(f"the reward {self.key} has no limit", "give it a limit, the length without a penalty")
        if self.pattern is None:
            return
        if self.prompt_opens:
            raise UserError(
                f"the reward {self.key} has both pattern and prompt_opens: prompt_opens would be ignored",
                "remove prompt_opens and write the pattern as answers begin",
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"the reward {self.key} has the pattern {quoted(self.pattern)}, which is not a regular expression: "
                f"{error}",
                "write a regular expression",
            ) from None


def _check_rewards(rewards: list[RewardSettings]) -> list[RewardSettings]:
    keys = [reward.key for reward in rewards]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise UserError(f"several rewards have the name {twice[0]}", "give each of them a label of its own")
    return rewards


Rewards = Annotated[list[RewardSettings], AfterValidator(_check_rewards)]


class RewardPoolSettings(Section):
    """The processes that compute rewards beside the sampling; only for methods that sample answers."""

    workers: Int = Field(
        2, ge=1, le=256, description="number of processes on each data-parallel rank that compute rewards"
    )
    max_failed_fraction: Float = Field(
        0.5,
        ge=0,
        le=1,
        description="the run ends if a larger fraction of the last 1000 answers got no reward because a reward failed",
    )
