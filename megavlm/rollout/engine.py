"""The interface of engines, which sample answers to prompts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from megavlm.data.row import Sample


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
    """

    tokens: list[int]
    logprobs: list[float] = field(repr=False)
    policy_logprobs: list[float] = field(repr=False)
    sampled_logprobs: list[float] = field(repr=False)
    finish: Literal["stop", "length"]
    routing: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers, in the order of the seeds, and which experts its tokens went to (as in ``Answer``)."""

    prompt: Prompt
    answers: list[Answer]
    routing: Tensor | None = field(default=None, repr=False, compare=False)


class Engine(Protocol):
    """Samples answers with the weights of the model that is trained.

    Attributes:
        samples_apart: whether ``generate`` works on leaders alone, without any collective, and may run in a thread
            while the model learns, also while ``sync`` is called. What it raises, it then raises on that rank alone.
    """

    samples_apart: bool

    @property
    def samples_apart(self) -> bool:
        """Whether ``generate`` is called on leaders alone, communicates with no other rank of the trainer, and may run
        in several threads while the model learns."""

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
