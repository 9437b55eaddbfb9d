"""The loop of sampling: in each round every group of sequences gets one token, and free places get new prompts.

There are as many groups as pipeline stages. While one stage works on a group, the others work on other groups. The
order of operations is (round, chunk of the stage, group) on all stages. What they decide in it follows from tokens
that all of them know by then; only what the leader has read is told.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.base.heartbeat import beat
from megavlm.base.stop_signals import StepLeft
from megavlm.model.vlm import VLM
from megavlm.platform import device
from megavlm.platform.batch_invariant import batch_invariant
from megavlm.platform.collectives import broadcast_object
from megavlm.rollout.answers import Ending, Growing, OpenPrompt
from megavlm.rollout.blocks import Blocks, KeyValuePool
from megavlm.rollout.engine import Answered
from megavlm.rollout.memory import Memory
from megavlm.rollout.places import Places
from megavlm.rollout.routing_pool import RoutingPool
from megavlm.rollout.rows import Operation, RowMaker
from megavlm.rollout.source import Dealt, PromptSource
from megavlm.rollout.stages import Stages
from megavlm.rollout.timing import Timer

_BETWEEN_LOOKS = 16  # rounds, after which the ranks ask each other whether to leave


@dataclass(frozen=True)
class _News:
    """What the leader tells the other ranks: (length, next position, seeds) of prompts that start now, and more.

    ``next_length`` is the length of a prompt that waits for memory.
    """

    started: list[tuple[int, int, tuple[int, ...]]]
    next_length: int | None
    is_exhausted: bool


class Rounds:
    """Iterates over answered prompts on the leader; on the other ranks of the group it only works.

    Args:
        view: the model, see ``sampling_view``.
        source: prompts, on the leader of each sampling group.
        stages: runs the rows.
        ending: says when answers end.
        memory: the memory for keys and values.
        places: number of sequences at a time.
        longest: maximum number of tokens of an answer.
        prompt_tokens: maximum number of tokens of prompts in one row, unless a single prompt is longer.
        timer: see ``Stages``.
        invariant: whether to compute as ``megavlm.platform.batch_invariant``.
        records_routing: whether to keep the experts of all tokens.
        leaves: whether this rank wants to leave all prompts unanswered; None: none ever does.
    """

    def __init__(
        self, view: VLM, source: PromptSource | None, stages: Stages, ending: Ending, memory: Memory,
        *, places: int, longest: int, prompt_tokens: int, timer: Timer, invariant: bool,
        records_routing: bool, leaves: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        self._view, self._source, self._stages, self._memory = view, source, stages, memory
        self._prompt_tokens, self._leaves, self._number = prompt_tokens, leaves, 0
        blocks = Blocks(memory.blocks)
        self._routing = RoutingPool(view, blocks) if records_routing else None
        self._rows = RowMaker(view, KeyValuePool(blocks), timer, self._routing)
        self._invariant = invariant
        count = min(stages.count, places)
        self._groups = [Places((places + n) // count, blocks, ending, longest) for n in range(count)]
        self._last: list[Operation | None] = [None] * count
        self._open = set(range(count))
        self._finished: list[OpenPrompt] = []
        self._is_exhausted = False
        self._next_length: int | None = None
        groups, parallel = view.groups, view.parallel
        # ranks whose experts a row of this rank needs, other than its own tensor ranks: they all compute or none does
        self._share_experts = parallel.expert * parallel.expert_tensor > parallel.tensor
        self._peers = groups.sampling.peers_host

    def __iter__(self) -> Iterator[Answered]:
        while self._open and not self._is_left():
            operations: dict[int, Operation] = {}
            for group in sorted(self._open):
                with self._mode():
                    answered = self._end(group)
                yield from answered
                with self._mode():
                    operation = self._begin(group) if group in self._open else None
                    if operation is not None:
                        operations[group] = operation
                        self._stages.run(0, group, operation)
            with self._mode():
                for chunk in range(1, len(self._view.language)):
                    for group, operation in operations.items():
                        self._stages.run(chunk, group, operation)
        self._stages.finish()

    def _is_left(self) -> bool:
        """Whether a rank wants to leave. Then what other stages have sent is received, and all groups are closed."""
        self._number += 1
        if self._leaves is None or self._number % _BETWEEN_LOOKS != 1:
            return False
        here = torch.tensor([int(self._leaves())])
        dist.all_reduce(here, op=dist.ReduceOp.MAX, group=self._view.groups.model_parallel_host)
        if not self._anywhere(bool(here.item())):
            return False
        for last in (self._last[group] for group in sorted(self._open)):
            if last is not None:
                self._stages.drawn(last)
        if self._source is not None:
            self._source.fail(StepLeft())
        return True

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Must not be on while the caller works on a result."""
        with torch.no_grad(), batch_invariant(self._invariant):
            yield

    def _end(self, group: int) -> list[Answered]:
        """Ends the group's operation of the previous round, and closes the group if it was the last."""
        places, last = self._groups[group], self._last[group]
        self._last[group] = None
        if last is not None:
            drawn = self._stages.drawn(last)
            done = places.add(drawn)
            if self._routing is not None:  # before the memory that is free now is written to again
                self._routing.keep([answer for _, answer, *_ in drawn], done)
            self._finished += done
        is_busy = not places.is_empty or not self._is_exhausted or (self._peers is not None and bool(self._finished))
        if not self._anywhere(is_busy):
            self._open.discard(group)
        finished, self._finished = self._finished, []
        if self._source is None:
            return []
        if isinstance(self._source, Dealt):  # prompts of context-parallel ranks are handed to the first of them
            return self._source.exchange(places.free, finished) if group in self._open else []
        return [asked.answered() for asked in finished]

    def _begin(self, group: int) -> Operation | None:
        """Fills free places and makes the group's next row; None if there is nothing to compute."""
        beat("sampling")
        places = self._groups[group]
        places.let_in()
        operation = self._rows.make(self._start_prompts(places), places.growing)
        if operation is None and self._share_experts:
            operation = self._rows.padding()
        self._last[group] = operation
        return operation

    def _anywhere(self, flag: bool) -> bool:
        """Whether it is true on any rank that must go through the same operations."""
        if self._share_experts:
            box = torch.tensor([int(flag)], device=device())
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._view.groups.language.tp_dp_cp)
        elif self._peers is not None:
            box = torch.tensor([int(flag)])
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._peers)
        else:
            return flag
        return bool(box.item())

    def _start_prompts(self, places: Places) -> list[OpenPrompt]:
        """Starts prompts in free places. The leader chooses, and the other ranks follow."""
        waits_for_memory = self._next_length is not None and not places.fits(self._next_length)
        if self._is_exhausted or not places.free or waits_for_memory:
            return []
        new = self._choose_prompts(places) if self._source is not None else []
        news = None
        if self._source is not None:
            waiting = self._source.look() if places.free else None
            news = _News(
                [(asked.length, asked.next_position, tuple(a.seed for a in asked.answers)) for asked in new],
                len(waiting.sample.input_ids) if waiting is not None else None,
                self._source.is_exhausted,
            )
        told = broadcast_object(news, self._view.groups.model_parallel_host)
        assert told is not None
        self._next_length, self._is_exhausted = told.next_length, told.is_exhausted
        if self._source is None:
            new = [_asked(length, position, seeds) for length, position, seeds in told.started]
            for asked in new:
                places.start(asked)
        return new

    def _choose_prompts(self, places: Places) -> list[OpenPrompt]:
        assert self._source is not None
        new: list[OpenPrompt] = []
        while places.free and (prompt := self._source.look()) is not None:
            length = len(prompt.sample.input_ids)
            try:
                self._memory.check(places.needed(length), length, prompt.sample.source)
            except Exception as error:
                self._source.fail(error)
                break
            is_full = bool(new) and sum(asked.length for asked in new) + length > self._prompt_tokens
            if is_full or not places.fits(length):
                break
            prompt, ticket = self._source.take()
            asked = _asked(length, int(prompt.sample.position_ids.max()) + 1, prompt.seeds)
            asked.prompt, asked.ticket = prompt, ticket
            places.start(asked)
            new.append(asked)
        return new


def _asked(length: int, next_position: int, seeds: Sequence[int]) -> OpenPrompt:
    return OpenPrompt(length, next_position, [Growing(seed) for seed in seeds])
