"""Where the leader of a sampling group gets prompts, and what becomes of finished ones."""

import itertools
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megavlm.platform.collectives import gather_objects, scatter_objects
from megavlm.rollout.answers import OpenPrompt
from megavlm.rollout.engine import Answered, Prompt


class PromptSource:
    """Prompts in their order, of which the next can be looked at before it is taken.

    Args:
        prompts: the prompts.

    Attributes:
        error: what reading has raised. No prompt is read after that.
    """

    def __init__(self, prompts: Iterator[Prompt]) -> None:
        self._prompts, self._next, self._is_used_up = prompts, deque[tuple[Prompt, int]](), False
        self.error: Exception | None = None

    @property
    def is_exhausted(self) -> bool:
        """Whether there will be no further prompt."""
        return self._is_used_up and not self._next

    def look(self) -> Prompt | None:
        """The next prompt; None if there is none now."""
        if not self._next and not self._is_used_up:
            self._read()
        return self._next[0][0] if self._next else None

    def take(self) -> tuple[Prompt, int]:
        """Takes the prompt that ``look`` has returned, with its ticket."""
        return self._next.popleft()

    def fail(self, error: Exception) -> None:
        """Ends reading because of a prompt that cannot be answered."""
        self.error, self._is_used_up = self.error or error, True
        self._next.clear()

    def _read(self) -> None:
        try:
            prompt = next(self._prompts, None)
        except Exception as error:  # it is raised when the other ranks can raise it, too
            self.fail(error)
            return
        if prompt is None:
            self._is_used_up = True
        else:
            self._next.append((prompt, 0))


class Dealt(PromptSource):
    """Prompts that the first of several context-parallel ranks deals to all of them, as each has room.

    Args:
        prompts: the prompts; None on all ranks but the first.
        group: these ranks, on the host network.
    """

    def __init__(self, prompts: Iterator[Prompt] | None, group: dist.ProcessGroup) -> None:
        super().__init__(iter(()))
        self._group, self._dealer = group, PromptSource(prompts) if prompts is not None else None
        self._given: dict[int, Prompt] = {}  # by ticket
        self._tickets = 0

    def look(self) -> Prompt | None:
        """The next prompt that was dealt to this rank."""
        return self._next[0][0] if self._next else None

    def exchange(self, room: int, finished: list[OpenPrompt]) -> list[Answered]:
        """Asks for prompts and hands in answers. Call it on all ranks of the group.

        Args:
            room: number of answers for which there are places.
            finished: prompts that this rank has answered.

        Returns:
            On the first rank the prompts that any rank has answered; [] elsewhere.
        """
        queued = sum(len(prompt.seeds) for prompt, _ in self._next)
        sizes = torch.tensor([0 if self._is_used_up else max(0, room - queued), len(finished)])
        everyone = [torch.empty_like(sizes) for _ in range(self._group.size())]
        dist.all_gather(everyone, sizes, group=self._group)
        wanted, handed_in = zip(*(part.tolist() for part in everyone), strict=True)
        if any(wanted):
            hands = self._deal(list(wanted)) if self._dealer is not None else None
            prompts, self._is_used_up = scatter_objects(hands, self._group)
            self._next.extend(prompts)
        if not any(handed_in):
            return []
        mine = [(asked.ticket, [answer.result() for answer in asked.answers], asked.routing) for asked in finished]
        everything = itertools.chain.from_iterable(gather_objects(mine, self._group))
        return [Answered(self._given.pop(ticket), answers, routing) for ticket, answers, routing in everything]

    def _deal(self, wanted: list[int]) -> list[tuple[list[tuple[Prompt, int]], bool]]:
        """Gives prompts to the ranks one by one, each time to the one with most room."""
        assert self._dealer is not None
        hands: list[list[tuple[Prompt, int]]] = [[] for _ in wanted]
        while max(wanted) > 0 and (prompt := self._dealer.look()) is not None:
            self._dealer.take()
            rank = wanted.index(max(wanted))
            wanted[rank] -= len(prompt.seeds)
            self._tickets += 1
            self._given[self._tickets] = prompt
            hands[rank].append((prompt, self._tickets))
        self.error = self.error or self._dealer.error
        return [(hand, self._dealer.is_exhausted) for hand in hands]
