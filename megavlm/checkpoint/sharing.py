"""Parameters of which several data ranks have pieces: which pieces are sent to whom, and when, and put together.

The whole tensors are put together in host memory, where a checkpoint is copied anyway. On the device, a rank has a
buffer for what it receives at a time, and of state that is not there in float32 also for what it sends, so that the
memory needed there does not grow with the model.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

AT_A_TIME = 2**26
"""Bytes that a rank receives in a round, at most: little beside a GPU's memory, and much for one message."""

Pieces = Mapping[int, tuple[int, int]]
"""The elements of a parameter that each data rank has: {rank: (first, last)}."""


class Transfer(NamedTuple):
    """Elements ``first`` to ``last`` of one kind of state of a parameter, from one data rank to another."""

    parameter: int
    kind: str
    first: int
    last: int
    sender: int
    receiver: int

    @property
    def size(self) -> int:
        """Bytes, of numbers in float32."""
        return 4 * (self.last - self.first)


def owner_of(pieces: Pieces) -> int:
    """The data rank that stores a parameter: the first of those that have most of it."""
    return max(pieces, key=lambda rank: (pieces[rank][1] - pieces[rank][0], -rank))


def rounds_of(parameters: Iterable[Pieces], kinds: Sequence[str]) -> list[list[Transfer]]:
    """All transfers of a group, in rounds in which no rank receives more than ``AT_A_TIME`` bytes.

    The result is the same on all ranks, which go through it together: else some could wait for each other in a circle.

    Args:
        parameters: the pieces of every parameter, of one that a single rank has, too.
        kinds: the kinds of state that each parameter has.
    """
    rounds: dict[int, list[Transfer]] = defaultdict(list)
    number, used = Counter[int](), Counter[int]()  # of each receiver: its last round, and the bytes in it
    at_most = AT_A_TIME // 4
    for index, pieces in enumerate(parameters):
        owner = owner_of(pieces)
        for rank, (first, last) in pieces.items():
            if rank == owner:
                continue
            for kind in kinds:
                for begin in range(first, last, at_most):
                    one = Transfer(index, kind, begin, min(begin + at_most, last), rank, owner)
                    if used[owner] + one.size > AT_A_TIME:
                        number[owner], used[owner] = number[owner] + 1, 0
                    used[owner] += one.size
                    rounds[number[owner]].append(one)
    return [rounds[index] for index in range(len(rounds))]


def largest_buffer(rounds: Iterable[Iterable[Transfer]], rank: int | None = None, *, sends: bool = False) -> int:
    """Bytes of the largest buffer that a data rank needs in a round, or that ``rank`` needs.

    It has what the rank receives and, with ``sends``, also what it sends.
    """
    sizes = Counter[tuple[int, int]]()
    for number, transfers in enumerate(rounds):
        for one in transfers:
            for place in (one.receiver, one.sender) if sends else (one.receiver,):
                if rank in (None, place):
                    sizes[number, place] += one.size
    return max(sizes.values(), default=0)


def put_together(
    parameters: Sequence[Pieces],
    kinds: Sequence[str],
    own: Callable[[int], Mapping[str, Tensor]],
    group: dist.ProcessGroup,
    device: torch.device,
    readable: Callable[[Tensor], Tensor] | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Returns the state of the parameters that this rank stores, by their number. Call it on all ranks of the group.

    What this rank has alone is returned as it is, or as ``readable`` makes it; all other tensors are in host memory.

    Args:
        parameters: the pieces of each parameter, in the same order on all ranks.
        kinds: the kinds of state that each parameter has.
        own: returns what this rank has of a parameter, by its number: {kind: its elements [n]}, in float32 on the
            device unless there is ``readable``.
        group: the data ranks.
        device: from where and to where ranks send.
        readable: makes float32 tensors that a forked process can read, in memory of their own, of what ``own`` returns.
    """
    rank, rounds = group.rank(), rounds_of(parameters, kinds)
    here = {number: own(number) for number, pieces in enumerate(parameters) if rank in pieces}
    if readable is None:
        assert all(tensor.dtype == torch.float32 for tensors in here.values() for tensor in tensors.values())
    stored: dict[int, dict[str, Tensor]] = {}
    for number, tensors in here.items():
        pieces = parameters[number]
        if owner_of(pieces) != rank:
            continue
        if len(pieces) == 1:
            stored[number] = {kind: readable(one) if readable is not None else one for kind, one in tensors.items()}
            continue
        count, (first, last) = max(last for _, last in pieces.values()), pieces[rank]
        # Not pinned: a forked process writes the checkpoint, and it must see what is here.
        stored[number] = {kind: torch.empty(count, dtype=torch.float32, device="cpu") for kind in kinds}
        for kind in kinds:
            stored[number][kind][first:last].copy_(tensors[kind])
    size = largest_buffer(rounds, rank, sends=readable is not None) // 4
    buffer = torch.empty(size, dtype=torch.float32, device=device)
    for transfers in rounds:
        operations, received, used = [], list[tuple[Tensor, Tensor]](), 0
        for number, kind, first, last, sender, receiver in transfers:
            if sender == rank:
                begin, _ = parameters[number][rank]
                sent = here[number][kind][first - begin : last - begin]
                if readable is not None:
                    sent = buffer[used : used + last - first].copy_(sent)
                    used += last - first
                operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=receiver))
            elif receiver == rank:
                place = buffer[used : used + last - first]
                used += last - first
                received.append((stored[number][kind][first:last], place))
                operations.append(dist.P2POp(dist.irecv, place, group=group, group_peer=sender))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for whole, place in received:
            whole.copy_(place)
    return stored
