"""Log-probabilities of whole answers: sums over the targets of each sample of a row."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megavlm.data.row import IGNORE, Row
from megavlm.runtime.feed import MicroBatch


def answer_logprobs(logprobs: Tensor, micro_batch: MicroBatch, context: dist.ProcessGroup) -> Tensor:
    """float32 [samples of the row]: summed log-probability of each sample's targets, the same on all ranks.

    Args:
        logprobs: [slices, m], of the targets in this context rank's part of the row.
        context: context-parallel ranks, which hold the other targets of the same samples.
    """
    known = torch.where(micro_batch.targets.weights > 0, logprobs, 0.0)  # the rest is filled up
    sums = logprobs.new_zeros(micro_batch.host.num_samples)
    sums = sums.index_add(0, micro_batch.target_samples.flatten(), known.flatten())
    return sum_of_ranks(sums, context)


def sum_of_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks that each hold a part, on all of them.

    Every rank then works out the same loss, whose gradient is each one's for its own part.
    """
    return _SumOfRanks.apply(value, group) if group.size() > 1 else value


def answer_lengths(row: Row) -> Tensor:
    """float32 [samples] on the host: targets of each sample."""
    starts = row.cu_seqlens[: row.num_samples].numpy()
    return torch.from_numpy(np.add.reduceat((row.labels != IGNORE).numpy(), starts, dtype=np.float32))


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
