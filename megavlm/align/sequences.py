"""Log-probabilities of whole answers, that is, sums over the targets of each sample of a row."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megavlm.data.row import IGNORE, Row
from megavlm.runtime.feed import MicroBatch


def answer_logprobs(logprobs: Tensor, micro_batch: MicroBatch, context: dist.ProcessGroup) -> Tensor:
    """Sums the log-probabilities of each sample's targets: float32 [samples of the row], the same on all ranks.

    Args:
        logprobs: [slices, m], log-probabilities of the targets in this context-parallel rank's part of the row.
        micro_batch: the micro-batch of the row.
        context: the context-parallel ranks, which have the other targets of the same samples.
    """
    known = torch.where(micro_batch.targets.weights > 0, logprobs, 0.0)  # entries without a weight are filling
    sums = logprobs.new_zeros(micro_batch.host.num_samples)
    sums = sums.index_add(0, micro_batch.target_samples.flatten(), known.flatten())
    return sum_of_ranks(sums, context)


def sum_of_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums ``value`` over the ranks of ``group``, each of which has a part of it. All ranks get the sum.

    Then each rank computes the same loss, and the backward pass gives each rank the gradient of its own part.
    """
    return _SumOfRanks.apply(value, group) if group.size() > 1 else value


def answer_lengths(row: Row) -> Tensor:
    """Counts the targets of each sample: float32 [samples] on the host."""
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
