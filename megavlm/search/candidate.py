"""A layout that a search has looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megavlm.plan.plan import Need


@dataclass(frozen=True)
class Candidate:
    """A layout, and what is predicted of it.

    Attributes:
        changes: the settings in which it differs from the configuration, by dotted name.
        memory: bytes on the fullest rank; None if it was ruled out before they were counted.
        seconds: of a step; None if that was not computed.
        tokens_per_second: of one GPU, padding left out.
        mfu: share of the GPU's dense bf16 peak that the model's own operations use.
        ruled_out: why it cannot be taken, such as "needs 3.1 GiB more"; None if it can.
        parts: seconds of a step by what the slowest stage spends them on, see ``StepTime``; None like ``seconds``.
        static: bytes that the fullest rank holds all the time; None like ``memory``.
        needs: see ``Plan.needs``.
    """

    changes: dict[str, Any]
    memory: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    ruled_out: str | None = None
    parts: Mapping[str, float] | None = None
    static: int | None = None
    needs: Mapping[Need, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """All but ``needs``, for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "needs"}
