"""The environment section: what answers the model between its turns in reinforcement learning."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.section import Float, Int, Section, Str

ENVIRONMENT = "environment"  # the name of its reward in metrics and reports


class EnvironmentSettings(Section):
    """An environment of your own, with which the model speaks in several turns; only for methods that sample."""

    python: Str | None = Field(
        None,
        description="class or function that makes an environment, written FILE.py:NAME; a relative path starts from "
        "the current folder. null: answers have one turn",
    )
    options: dict[Str, Any] = Field({}, description="arguments with which the class or function is called")
    max_turns: Int = Field(8, ge=1, description="maximum number of answers of the model in a conversation")
    max_tokens: Int | None = Field(
        None,
        ge=1,
        description="maximum number of tokens of a conversation after its prompt, the model's and the environment's "
        "together; rollout.max_new_tokens is the maximum of one answer. Prompts that leave less room than this in a "
        "row of data.seq_length tokens are dropped. It must be set if there is an environment",
    )
    role: Literal["user", "tool"] = Field(
        "user", description="role in which the chat template writes what the environment says"
    )
    weight: Float = Field(
        1.0,
        description="factor of the environment's reward in the sum, beside those of the list reward; 0: it is only "
        "reported in the metrics",
    )
    timeout: Float = Field(
        60.0,
        gt=0,
        description="seconds that reset, and each step, of an environment may take. A conversation whose environment "
        "needs longer gets no reward and is left out of the update",
    )
    workers: Int = Field(
        2, ge=1, le=256, description="number of processes on each data-parallel rank that run environments"
    )

    @property
    def file(self) -> Path | None:
        """The Python file; None without an environment."""
        return Path(self.python.rpartition(":")[0]).expanduser() if self.python else None

    @property
    def name(self) -> str:
        """The name of the class or function in the file; "" without an environment."""
        return self.python.rpartition(":")[2] if self.python else ""

    @model_validator(mode="after")
    def _consistent(self) -> "EnvironmentSettings":
        if self.python is None:
            for name in type(self).model_fields:
                if self.is_changed(name):
                    raise UserError(
                        f"{ENVIRONMENT}.{name} is {quoted(getattr(self, name))}, but there is no environment: it would "
                        "be ignored",
                        f"set {ENVIRONMENT}.python, or remove {ENVIRONMENT}.{name}",
                    )
            return self
        if not re.fullmatch(r"[^\0]*[^/\0]:[A-Za-z_]\w*", self.python):
            raise UserError(
                f"{ENVIRONMENT}.python is {quoted(self.python)}, which is not FILE.py:NAME",
                "write the file, a colon and the name of a class or function in it, for example doors.py:Door",
            )
        if self.max_tokens is None:
            raise UserError(
                f"{ENVIRONMENT}.max_tokens is not set, but there is an environment",
                "set it to the number of tokens that a conversation may have after its prompt",
            )
        return self
