"""One answer that grows turn by turn."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megavlm.data.answers import continued, followed_by
from megavlm.data.row import Sample
from megavlm.environments.worker_process import Episode
from megavlm.rollout.engine import Answer, Turn


@dataclass(eq=False)
class Conversation:
    """An answer that grows turn by turn.

    Attributes:
        seed: the seed of the answer; that of a turn follows from it.
        episode: its environment.
        sample: all that was said so far, with the prompt; at first the prompt alone.
        room: number of tokens that it may still get.
        values: of each token that followed the prompt, as in ``Answer``: token, three log-probabilities, ``said``.
        num_turns: number of the model's turns.
        is_over: whether nothing follows.
    """

    seed: int
    episode: Episode
    sample: Sample
    room: int
    values: list[tuple[int, float, float, float, bool]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    num_turns: int = 0
    routing: Tensor | None = None
    finish: Literal["stop", "length"] = "stop"
    reward: float = 0.0
    failures: tuple[str, ...] = ()
    is_over: bool = False
    is_out_of_turns: bool = False

    def hear(self, answer: Answer, routing: Tensor | None) -> None:
        """Adds a turn of the model, cut off where there is no more room.

        Args:
            answer: the turn.
            routing: the experts of all tokens before it; those of what was said are known already, but for the last.
        """
        kept = answer.tokens[: self.room]
        values = zip(kept, answer.logprobs, answer.policy_logprobs, answer.sampled_logprobs, strict=False)
        self.values += [(*value, True) for value in values]
        if routing is not None and answer.routing is not None:
            known = routing[:0] if self.routing is None else self.routing[:-1]
            self.routing = torch.cat([known, routing[len(known) :], answer.routing[: len(kept)]])
        self.finish = answer.finish if len(kept) == len(answer.tokens) else "length"
        self.sample, self.room = continued(self.sample, kept), self.room - len(kept)
        self.num_turns += 1

    def read(self, message: Sample) -> None:
        """Adds a message of the environment, for which there is room."""
        self.sample, self.room = followed_by(self.sample, message), self.room - len(message.input_ids)
        self.values += [(token, 0.0, 0.0, 0.0, False) for token in message.input_ids.tolist()]

    def fail(self, cause: str) -> None:
        self.failures, self.is_over = (cause,), True

    def result(self) -> Answer:
        """The finished answer."""
        logprobs, policy, sampled = ([float(value[n]) for value in self.values] for n in (1, 2, 3))
        tokens, said = [token for token, *_ in self.values], [is_said for *_, is_said in self.values]
        return Answer(
            tokens, logprobs, policy, sampled, self.finish, self.routing, said, self.sample,
            None if self.failures else self.reward, self.failures, tuple(self.turns), self.is_out_of_turns,
        )  # fmt: skip
