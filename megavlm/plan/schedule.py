"""When each pipeline stage computes which micro-batch: Megatron's 1F1B schedule and its interleaved form, simulated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """A forward or backward pass of one micro-batch through one chunk of a stage."""

    backward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Passes:
    """Seconds of the passes of a micro-batch through one chunk of a stage."""

    forward: float
    backward: float


class Timed(NamedTuple):
    """A turn with its stage and its start and end in seconds."""

    stage: int
    turn: Turn
    start: float
    end: float


def turns(stage: int, stages: int, micro_batches: int, chunks: int = 1) -> list[Turn]:
    """The turns of a stage, in Megatron's order.

    Args:
        stage, stages: the pipeline stage from 0, and the number of stages.
        micro_batches: number of micro-batches; divisible by ``stages`` if there are several chunks.
        chunks: number of chunks of a stage.
    """
    if chunks == 1:
        forwards = [(micro_batch, 0) for micro_batch in range(micro_batches)]
        backwards, ahead = forwards, stages - stage - 1
    else:  # groups of as many micro-batches as there are stages go through all chunks
        groups = [range(first, first + stages) for first in range(0, micro_batches, stages)]
        forwards = [(m, chunk) for group in groups for chunk in range(chunks) for m in group]
        backwards = [(m, chunk) for group in groups for chunk in reversed(range(chunks)) for m in group]
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, len(forwards))
    order = [Turn(False, *forward) for forward in forwards[:ahead]]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [Turn(False, *forward), Turn(True, *backward)]
    return order + [Turn(True, *backward) for backward in backwards[len(forwards) - ahead :]]


def timeline(
    passes: Sequence[Passes], micro_batches: int, chunks: int, *, head: Passes, message: float, start: float = 0.0
) -> list[Timed]:
    """Simulates the schedule of one window. A turn starts when its stage is free and its input has arrived.

    Args:
        passes: of each stage.
        micro_batches, chunks: see ``turns``.
        head: of the last chunk of the last stage, in addition.
        message: seconds in which hidden states, or their gradients, go from a stage to the next one.
        start: when all stages begin.
    """
    stages = len(passes)
    queues = [turns(stage, stages, micro_batches, chunks) for stage in range(stages)]
    free, places, found = [start] * stages, [0] * stages, []
    ends: dict[tuple[bool, int, int], float] = {}  # of passes: (backward, micro-batch, position in the decoder)
    last = stages * chunks - 1
    waiting = list(range(stages))
    while waiting:
        stage = waiting.pop()
        while places[stage] < len(queues[stage]):
            turn = queues[stage][places[stage]]
            level = turn.chunk * stages + stage  # position in the whole decoder
            needed: tuple[bool, int, int] | None
            if turn.backward:
                needed = (False, turn.micro_batch, level) if level == last else (True, turn.micro_batch, level + 1)
            else:
                needed = (False, turn.micro_batch, level - 1) if level else None
            if needed is not None and needed not in ends:
                break
            is_sent = needed is not None and needed[2] != level and stages > 1
            ready = ends[needed] + message * is_sent if needed is not None else start
            own = passes[stage].backward if turn.backward else passes[stage].forward
            if level == last:
                own += head.backward if turn.backward else head.forward
            begin = max(free[stage], ready)
            free[stage] = ends[turn.backward, turn.micro_batch, level] = begin + own
            found.append(Timed(stage, turn, begin, free[stage]))
            places[stage] += 1
            for other in ((stage + 1) % stages, (stage - 1) % stages):
                if other not in waiting and places[other] < len(queues[other]):
                    waiting.append(other)
    assert len(found) == sum(map(len, queues)), "the schedule stands still"
    return found
