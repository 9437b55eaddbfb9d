"""The interface of engines, which sample answers to prompts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from megavlm.data.row import Asked, Sample


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends.

    Attributes:
        max_new_tokens: maximum number of tokens of an answer.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: tokens are chosen among the most likely ones whose probabilities sum to this; 1: among all.
        top_k: tokens are chosen among this number of most likely ones; 0: among all.
        stop: tokens that end an answer.
        stop_strings: texts that end an answer as soon as its own text contains one of them.
        banned: tokens that are never chosen, such as placeholders of pictures.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how many answers are wanted.

    Attributes:
        sample: the rendered prompt (kind "prompt") with its pixels.
        seeds: one for each answer, at least one, in 0 … 2⁶³ - 1. The tokens of an answer depend on the weights, the
            prompt and its seed alone: not on what else is answered at the same time, nor on the number of ranks.
    """

    sample: Sample
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """What one of the two has said in a conversation, for readers.

    Attributes:
        by: who has said it.
        text: what was said; of the model with special tokens.
        pictures: the bytes of picture files.
    """

    by: Literal["model", "environment"]
    text: str
    pictures: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Answer:
    """A sampled answer of n tokens. Of each token there are three log-probabilities in nats, which differ as follows.

    Attributes:
        tokens: the tokens, with the stop token if the answer ended with one.
        logprobs: under the model itself, before temperature and filters, as `megavlm score` computes them.
        policy_logprobs: after the temperature, before top_k, top_p and the ban of tokens, as a trainer computes them
            (with temperature 0 as ``logprobs``).
        sampled_logprobs: after temperature and filters: of the distribution that the token was drawn from (with
            temperature 0, zeros).
        finish: "stop", or "length" if max_new_tokens has cut the answer off.
        routing: which experts each token went to, see ``megavlm.runtime.routing`` (not known of the last one, which the
            model has not read); None: the engine was not asked to record it.

    Of an answer in several turns (``megavlm.rollout.conversations``), the tokens are all that followed the prompt, the
    environment's among them, whose log-probabilities are 0. ``finish`` is that of the last turn, or "length" if there
    was no room for a further one, and ``routing`` is that of all tokens of ``continued``. It also has:

    Attributes:
        said: of each token, whether the model has said it; None: all.
        continued: the whole conversation with its pictures, without targets; it ends with ``tokens``. If the
            environment has spoken first, its message is among them and takes the place of the end of the prompt.
        reward: the sum of the rewards that the environment has given; None if it failed, or if there is none.
        failures: why the environment failed.
        turns: what was said, in order; () without an environment.
        is_out_of_turns: whether it ended only because the model may not have a further turn.
    """

    tokens: list[int]
    logprobs: list[float] = field(repr=False)
    policy_logprobs: list[float] = field(repr=False)
    sampled_logprobs: list[float] = field(repr=False)
    finish: Literal["stop", "length"]
    routing: Tensor | None = field(default=None, repr=False, compare=False)
    said: list[bool] | None = field(default=None, repr=False)
    continued: Sample | None = field(default=None, repr=False, compare=False)
    reward: float | None = None
    failures: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = field(default=(), repr=False)
    is_out_of_turns: bool = False

    @property
    def num_said(self) -> int:
        """The number of tokens that the model has said."""
        return len(self.tokens) if self.said is None else sum(self.said)

    @property
    def num_turns(self) -> int:
        """The number of turns of the model."""
        return sum(turn.by == "model" for turn in self.turns) if self.said is not None else 1

    @property
    def last(self) -> list[int]:
        """The tokens of the model's last turn, which rewards judge."""
        if self.said is None:
            return self.tokens
        end = next((n for n in range(len(self.said), 0, -1) if self.said[n - 1]), 0)
        start = next((n for n in range(end, 0, -1) if not self.said[n - 1]), 0)
        return self.tokens[start:end]


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers, in the order of the seeds, and which experts its tokens went to (as in ``Answer``)."""

    prompt: Prompt
    answers: list[Answer]
    routing: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def asked(self) -> Asked:
        """The record of the prompt, if it was drafted with it."""
        asked = self.prompt.sample.annotations.asked
        assert asked is not None, "prompts are drafted with their records"
        return asked


class Engine(Protocol):
    """Samples answers with the weights of the model that is trained.

    An engine has no state that a checkpoint would have to keep: which token is drawn depends on the weights, the prompt
    and the seed of its answer alone, and prompts whose answers were on their way at a stop are asked again. ``sync`` is
    given no weights, because an engine is made for a model and takes them from there: the built-in one samples in them,
    and what is sent to vLLM exists on the ranks only for a moment, one part of the weights after the other.
    """

    @property
    def samples_apart(self) -> bool:
        """Whether ``generate`` works on leaders alone, without any collective, and may run in threads, also in several
        at once, while the model learns or ``sync`` is called. What it raises, it then raises on that rank alone."""

    def generate(self, prompts: Iterator[Prompt] | None, sampling: Sampling) -> Iterator[Answered]:
        """Answers prompts. Call it on all ranks, and iterate to the end on all ranks.

        Args:
            prompts: finite; on the leader of each model-parallel group, None on the other ranks. They are read when
                there is room for them.
            sampling: how to sample.

        Yields:
            On the leader, each prompt with its answers as soon as all of them are finished, in any order; nothing on
            the other ranks.

        Raises:
            UserError: on all ranks, if a prompt can never fit in the memory that the settings allow.
            Exception: on all ranks, what reading a prompt raises. In both cases the prompts that were read before are
                answered first.
        """

    def sync(self) -> None:
        """Takes the present weights, and forgets all that was computed with earlier ones. Call it on all ranks."""

    def close(self) -> None:
        """Ends processes and frees memory."""
