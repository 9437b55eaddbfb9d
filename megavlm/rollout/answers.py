"""Prompts that are being answered and their answers: the state of sampling, which all ranks of a group hold alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from megavlm.rollout.engine import Answer, Answered, Prompt, Sampling


@dataclass(eq=False)
class Growing:
    """An answer that is being sampled.

    Attributes:
        seed: its seed.
        slots: where the keys and values of its tokens go; None: it waits for a place.
        values: of each token its three log-probabilities, as in ``Answer``.
        spelled: its tokens without special ones, in which stop strings are looked for.
        finish: as in ``Answer``; None: it goes on.
        routing: the experts of its tokens, see ``RoutingPool``; None before it is finished, or if nobody asks for them.
    """

    seed: int
    slots: np.ndarray | None = None
    tokens: list[int] = field(default_factory=list)
    values: list[tuple[float, float, float]] = field(default_factory=list)
    spelled: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    routing: Tensor | None = None

    def result(self) -> Answer:
        """The finished answer."""
        assert self.finish is not None
        logprobs, policy, sampled = (list(column) for column in zip(*self.values, strict=True))
        return Answer(self.tokens, logprobs, policy, sampled, self.finish, self.routing)


@dataclass(eq=False)
class OpenPrompt:
    """A prompt that is being answered.

    Attributes:
        length: number of its tokens.
        next_position: the rotary position of an answer's first token, on all three axes.
        answers: its answers in the order of the seeds.
        slots: where its keys and values are.
        prompt: the prompt, on the leader.
        ticket: number under which another rank has given the prompt to this one.
        routing: the experts of its tokens, as in ``Growing``.
    """

    length: int
    next_position: int
    answers: list[Growing]
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    prompt: Prompt | None = None
    ticket: int = 0
    routing: Tensor | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all its answers are."""
        return all(answer.finish is not None for answer in self.answers)

    def answered(self) -> Answered:
        """The result, on the leader that has read the prompt."""
        assert self.prompt is not None
        return Answered(self.prompt, [answer.result() for answer in self.answers], self.routing)


class Ending:
    """Says when an answer ends.

    Args:
        sampling: stop tokens, stop strings and the maximum length.
        decode: returns the text of tokens; needed for stop strings only.
        special: tokens that are not part of an answer's text.
    """

    def __init__(
        self, sampling: Sampling, decode: Callable[[list[int]], str] | None, special: Sequence[int] = ()
    ) -> None:
        assert decode is not None or not sampling.stop_strings, "stop strings need a tokenizer"
        self._sampling, self._decode = sampling, decode
        self._stop, self._special = set(sampling.stop), set(special)
        # a token that is not special has at least one byte
        self._window = max((len(text.encode()) for text in sampling.stop_strings), default=0)

    def add(self, answer: Growing, token: int, values: tuple[float, float, float]) -> None:
        """Adds a token to an answer and sets ``finish`` if it ends there."""
        answer.tokens.append(token)
        answer.values.append(values)
        if token in self._stop or self._spells_stop(answer, token):
            answer.finish = "stop"
        elif len(answer.tokens) == self._sampling.max_new_tokens:
            answer.finish = "length"

    def _spells_stop(self, answer: Growing, token: int) -> bool:
        if self._decode is None or not self._window or token in self._special:
            return False
        answer.spelled.append(token)
        text = self._decode(answer.spelled[-self._window :])
        return any(stop in text for stop in self._sampling.stop_strings)
