"""Places for sequences that are sampled at the same time, and the order in which prompts and answers get them.

Every decision here is a function of the tokens sampled so far, so all ranks of a group come to the same one.
"""

from collections import deque
from collections.abc import Sequence

from megavlm.rollout.answers import Ending, Growing, OpenPrompt
from megavlm.rollout.blocks import Blocks, blocks_for


class Places:
    """The places of one group of sequences.

    An answer that has a place also has memory for its longest length, so that it is never interrupted. A prompt starts
    only together with its first answer. Answers that wait for a place therefore always get one when others have ended.

    Args:
        count: number of places.
        blocks: the memory, which all groups share.
        ending: says when answers end; its longest answer sets the memory that an answer needs.
        longest: maximum number of tokens of an answer.
    """

    def __init__(self, count: int, blocks: Blocks, ending: Ending, longest: int) -> None:
        self._count, self._blocks, self._ending = count, blocks, ending
        self._own_tokens = longest - 1  # the last token is not fed to the model any more
        self.growing: list[tuple[OpenPrompt, Growing]] = []
        self._waiting: deque[tuple[OpenPrompt, Growing]] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether no answer has a place or waits for one."""
        return not self.growing and not self._waiting

    @property
    def free(self) -> int:
        """Number of places that a new prompt's answers could take; 0 while answers of earlier prompts wait."""
        return 0 if self._waiting else self._count - len(self.growing)

    def fits(self, length: int) -> bool:
        """Whether there is memory now for a prompt of ``length`` tokens and one answer."""
        return self.needed(length) <= self._blocks.free

    def start(self, asked: OpenPrompt) -> list[Growing]:
        """Takes a prompt's memory, and places for as many of its answers as can have one now, at least one.

        Returns all its answers; those without a place wait for one with their first token, which all get at once.
        """
        asked.slots = self._blocks.take(asked.length)
        self._waiting.extend((asked, answer) for answer in asked.answers)
        self.let_in()
        assert asked.answers[0].slots is not None
        return asked.answers

    def let_in(self) -> None:
        """Gives free places to waiting answers."""
        while self._waiting and len(self.growing) < self._count:
            if blocks_for(self._own_tokens) > self._blocks.free:
                return
            asked, answer = self._waiting.popleft()
            answer.slots = self._blocks.take(self._own_tokens)
            self.growing.append((asked, answer))

    def add(self, drawn: Sequence[tuple[OpenPrompt, Growing, int, tuple[float, float, float]]]) -> list[OpenPrompt]:
        """Adds sampled tokens to answers. Returns the prompts of which all answers have ended, whose memory is free."""
        for _, answer, token, values in drawn:
            self._ending.add(answer, token, values)
        for _, answer in self.growing:
            if answer.finish is not None and answer.slots is not None:
                self._blocks.give_back(answer.slots)
        self.growing = [(asked, answer) for asked, answer in self.growing if answer.finish is None]
        # an answer may end with its first token before it had a place
        self._waiting = deque((asked, answer) for asked, answer in self._waiting if answer.finish is None)
        done = list(dict.fromkeys(asked for asked, *_ in drawn if asked.is_finished))
        for asked in done:
            self._blocks.give_back(asked.slots)
        return done

    def needed(self, length: int) -> int:
        """The number of blocks of a prompt of ``length`` tokens and one answer."""
        return blocks_for(length) + blocks_for(self._own_tokens)
